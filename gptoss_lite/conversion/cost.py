"""What a conversion has cost, tensor by tensor, gathered from a plan that has been carried out."""

import math

from gptoss_lite.checkpoint import StoredForm
from gptoss_lite.conversion.plan import Plan
from gptoss_lite.conversion.recode import Recoded
from gptoss_lite.inspection import label
from gptoss_lite.quant.report import TensorReport


def tensor_reports(plan: Plan) -> tuple[TensorReport, ...]:
    """Report every weight, in the order of the network."""
    before, after = plan.checkpoint.forms(), plan.stored_forms()
    return tuple(
        _report(weight, before[weight.name.name], after[weight.name.name]) for weight in plan.weights
    )


def _report(weight: Recoded, before: StoredForm, after: StoredForm) -> TensorReport:
    errors, costs = weight.errors, weight.errors.costs
    return TensorReport(
        name=weight.name.name,
        layer=weight.name.layer,
        group=weight.name.group,
        before=label(before),
        after=label(after),
        bytes_before=before.nbytes,
        bytes_after=after.nbytes,
        squared=errors.squared,
        squared_error=errors.squared_error,
        largest_error=errors.largest_error,
        weights=math.prod(weight.name.shape),
        squared_error_plain=None if costs is None else costs.values_plain,
        weighted_error=None if costs is None else costs.outputs,
        weighted_error_plain=None if costs is None else costs.outputs_plain,
    )
