"""Several transfers at once, bounded, with progress; the first that fails ends the others."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from headrace.compile.progress import Progressing

T = TypeVar("T")

PARTS_AT_ONCE = 4
"""Each holds a part in memory, 64 MiB; more than four streams gain little on one connection."""


@dataclass(frozen=True, slots=True)
class Transfer(Generic[T]):
    """One part's work, and its size for the progress bar."""

    part_bytes: int
    run: Callable[[], T]


def transfer_all(transfers: Sequence[Transfer[T]], progress: Progressing) -> Sequence[T]:
    """Run all, `PARTS_AT_ONCE` at a time; answer their results in order.

    When one raises no other is begun, those that run are waited for, and it is raised.
    """
    total, done = sum(each.part_bytes for each in transfers), 0
    results: dict[int, T] = {}
    waiting = iter(enumerate(transfers))
    with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="part") as pool:
        running = {pool.submit(each.run): number for number, each in islice(waiting, PARTS_AT_ONCE)}
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                number = running.pop(future)
                results[number] = future.result()
                done += transfers[number].part_bytes
                progress.advance(done=done, total=total)
            for number, each in islice(waiting, len(finished)):
                running[pool.submit(each.run)] = number
    return [results[number] for number in range(len(transfers))]
