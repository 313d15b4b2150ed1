"""What a conversion has cost, tensor by tensor, gathered from a plan that has been carried out."""

import math

from gptoss_lite.conversion.plan import Plan
from gptoss_lite.inspection import label
from gptoss_lite.quant.report import TensorReport


def tensor_reports(plan: Plan) -> tuple[TensorReport, ...]:
    """Report every weight, in the order of the network."""
    before, after = plan.checkpoint.forms(), plan.stored_forms()
    return tuple(
        TensorReport(
            name=weight.name.name,
            layer=weight.name.layer,
            group=weight.name.group,
            before=label(before[weight.name.name]),
            after=label(after[weight.name.name]),
            bytes_before=before[weight.name.name].nbytes,
            bytes_after=after[weight.name.name].nbytes,
            weights=math.prod(weight.name.shape),
            squared=weight.errors.squared,
            squared_error=weight.errors.squared_error,
            largest_error=weight.errors.largest_error,
        )
        for weight in plan.weights
    )
