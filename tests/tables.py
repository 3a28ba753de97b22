"""Tables of cases as one test each."""

from collections.abc import Callable, Sequence

import pytest


def each(rows: Sequence[tuple | str]) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Makes of a check of one row a test that checks every row, and lists all that fail."""

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        def test() -> None:
            assert rows
            failed = []
            for row in rows:
                try:
                    check(*([row] if isinstance(row, str) else row))
                except (Exception, pytest.fail.Exception) as error:
                    failed.append(f"{str(row)[:200]}: {type(error).__name__}: {error}"[:600])
            assert not failed, "\n".join([f"{len(failed)} of {len(rows)} rows fail:", *failed])

        test.__name__, test.__qualname__, test.__doc__ = (
            check.__name__,
            check.__name__,
            check.__doc__,
        )
        return test

    return decorate
