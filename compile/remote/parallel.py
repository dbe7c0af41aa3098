"""Several transfers at once, bounded, with progress; the first that fails ends the others."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
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
    """Run all, at most `PARTS_AT_ONCE` at a time; answer their results in order.

    When one raises, what has not begun is dropped, what has is waited for, and it is raised.
    """
    total, done = sum(each.part_bytes for each in transfers), 0
    with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="part") as pool:
        futures = {pool.submit(each.run): each for each in transfers}
        try:
            for future in as_completed(futures):
                future.result()
                done += futures[future].part_bytes
                progress.advance(done=done, total=total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
