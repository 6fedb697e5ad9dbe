"""The options of configs/frozen_lake.py say what they name; its forms of recursion are those of mazes."""

import pytest

from configs import frozen_lake, maze
from trm_diffusion.conditions import make_condition
from trm_diffusion.config import resolve
from trm_diffusion.errors import UserError


@pytest.mark.parametrize("size", [4, 8, 16])
def test_every_size_is_a_config_whose_records_fit_it(size):
    config = resolve(frozen_lake.get_config(f"size={size},recursion=live"))
    source = make_condition(config).source()
    assert source.sample_shape == (4 * size, 4 * size, 3) and config.name == f"frozen_lake{size}_live"
    assert config.model.recursion.base_every_step


def test_forms_of_recursion_are_those_of_mazes():
    assert frozen_lake.RECURSION == maze.RECURSION


def test_refusals():
    with pytest.raises(UserError, match="recursion=on is none of off, paper, live"):
        frozen_lake.get_config("recursion=on")
    with pytest.raises(UserError, match="size=four: give the number of cells"):
        frozen_lake.get_config("size=four")
    with pytest.raises(UserError, match="a multiple of 4 from 16 to 64"):
        make_condition(resolve(frozen_lake.get_config("size=3"))).source()
