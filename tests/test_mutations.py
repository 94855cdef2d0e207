import pytest

import mutations


@pytest.mark.parametrize("m", mutations.MUTATIONS, ids=lambda m: m.flaw.replace(" ", "-"))
def test_every_mutation_still_has_its_line(m):
    assert m.old in (mutations.ROOT / m.file).read_text(), "the code moved on; bring the mutation up to date"


@pytest.mark.slow
@pytest.mark.parametrize("m", mutations.MUTATIONS, ids=lambda m: m.flaw.replace(" ", "-"))
def test_every_mutation_is_caught(m):
    assert mutations.caught_by(m), f"no law noticed: {m.flaw}"
