"""Which replica a request goes to: the one that has its conversation, if that is not too busy."""

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica


class ConversationRouter(ConsistentHashRouter):
    """Ray's consistent hashing of conversations, and the least busy replica where that would be unfair.

    A conversation is a handle's `session_id`. Every process that has a handle arrives at the same replica
    without asking another; when a replica goes, its conversations alone move.
    """

    def initialize_state(self, batch: int) -> None:
        """Take the number of requests that a replica answers at once."""
        self._batch = batch
        super().initialize_state()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank replicas; in one rank, Ray takes the least busy that accepts."""
        ranks: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or not pending_request.metadata.session_id or not ranks:
            return [candidate_replicas]
        [own] = ranks[0]
        others = [replica for replica in candidate_replicas if replica is not own]
        least = min(map(self._busy, others), default=self._batch)
        # To wait for a place where the cache is beats another's place only once nobody has one.
        if self._busy(own) >= self._batch + (least if least >= self._batch else 0):
            return [others, [own]]
        return [[own], others]

    def _busy(self, replica: RunningReplica) -> int:
        known: int | None = self.replica_queue_len_cache.get(replica.replica_id)
        return known or 0
