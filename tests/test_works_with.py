"Each cell of the page \"Works with\", checked by value"
import pytest
from works_with import CHECKS, LEARNERS, REFUSED, cells, read, run


@pytest.mark.parametrize('part, learner', cells(), ids=map(' × '.join, cells()))
def test_cell(part, learner):
    if 'timm' in learner: pytest.importorskip('timm')
    now, then = run(part, learner), read()[part][learner]
    assert (now['works'], now['note']) == (then['works'], then['note']), 'the table is old: run python tests/works_with.py'


def test_the_table_has_these_cells_and_no_others():
    assert {part: [*row] for part, row in read().items()} == {part: [*LEARNERS] for part in CHECKS}
    assert {*REFUSED} <= {*cells()} and all(f.__doc__ for f in CHECKS.values())
