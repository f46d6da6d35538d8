import pickle

from lmkv_ray.errors import ArenaError, LmkvError


def test_errors_name_the_next_step_and_survive_pickling() -> None:
    error = ArenaError("Too small.", next_step="Make it larger.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ArenaError
    assert isinstance(copy, LmkvError)
    assert str(copy) == str(error) == "Too small. Next step: Make it larger."
    assert (copy.what, copy.next_step) == ("Too small.", "Make it larger.")
