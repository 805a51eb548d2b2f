"""Which batches each of several processes takes: of N processes the k-th every N-th, from the k-th on.

A step of N processes has thereby the rows of a step of one process with N times the accumulation, in whatever order
they are drawn. Where the number of batches of an epoch does not divide by N, the last processes get a batch of nothing
(accelerate would give them rows of the epoch's beginning again, which would count twice).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset

from theodora.train.processes import Processes

NOTHING = "nothing"
"""In a batch: nothing is to be learned, or counted, of it."""
_NO_ROW = -1
_IGNORED = -100


class Share(BatchSampler):
    """The batches of one process.

    Args:
        whole: all batches; its sampler may be exchanged, as accelerate does, and draws alike in every process.
        processes: that share them.
    """

    def __init__(self, whole: BatchSampler, processes: Processes) -> None:
        super().__init__(whole.sampler, whole.batch_size, whole.drop_last)
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        count, index, batches = self.processes.count, self.processes.index, 0
        for batch in super().__iter__():
            if batches % count == index:
                yield batch
            batches += 1
        if index >= batches % count > 0:
            yield [_NO_ROW]

    def __len__(self) -> int:
        return -(-super().__len__() // self.processes.count)


class _Rows(Dataset[Any]):
    """Rows, and one more with nothing to learn."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        if list(places) == [_NO_ROW]:
            row = dict(self.rows[0])
            return [{**row, "labels": [_IGNORED] * len(row["labels"]), NOTHING: True}]
        if hasattr(self.rows, "__getitems__"):
            return self.rows.__getitems__(list(places))
        return [self.rows[place] for place in places]


class _Collate:
    """A collator that tells a batch of nothing."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        nothing = rows[0].pop(NOTHING, False)
        batch = self.collate(rows)
        if nothing:
            batch[NOTHING] = True
        return batch


def shared(loader: DataLoader[Any], processes: Processes) -> DataLoader[Any]:
    """A loader of this process' share of the batches of another, which nobody has begun to read."""
    whole: Any = loader.batch_sampler
    return DataLoader(
        _Rows(loader.dataset),
        batch_sampler=Share(whole, processes),
        collate_fn=_Collate(loader.collate_fn),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )
