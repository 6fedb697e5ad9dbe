"""The options of configs/maze.py say what they name, and nothing else differs between the forms of recursion."""

import flax
import pytest

from configs import maze
from trm_diffusion.conditions import make_condition
from trm_diffusion.config import resolve
from trm_diffusion.errors import UserError


def leaves(argument):
    return flax.traverse_util.flatten_dict(maze.get_config(argument).to_dict(), sep=".")


def test_forms_of_recursion_differ_in_what_they_name_alone():
    off, paper, live = (leaves(f"recursion={form}") for form in maze.RECURSION)
    assert {name for name in off if off[name] != paper[name]} == {"name", "model.recursion.blocks"}
    assert {name: live[name] for name in live if live[name] != paper[name]} == {
        "name": "maze4_live",
        "model.recursion.base_every_step": True,
        "model.recursion.base_input": "carry",
    }
    assert leaves("") == off


def test_the_yardstick_is_shallower_and_shorter():
    whole, yardstick = leaves("rooms=5,recursion=live"), leaves("rooms=5,recursion=live,yardstick=yes")
    assert {name: yardstick[name] for name in whole if whole[name] != yardstick[name]} == {
        "name": "maze5_live_yardstick",
        "model.depth": 2,
        "train.updates": 1500,
        "evaluate.min_solved": 0.0,
    }


@pytest.mark.parametrize("rooms", [3, 4, 15])
def test_every_size_is_a_config_whose_records_fit_it(rooms):
    config = resolve(maze.get_config(f"rooms={rooms},recursion=live"))
    source = make_condition(config).source()
    assert source.rooms == rooms and source.sample_shape == (2 * rooms - 1, 2 * rooms - 1, 1)


def test_refusals():
    with pytest.raises(UserError, match="recursion=on is none of off, paper, live"):
        maze.get_config("recursion=on")
    with pytest.raises(UserError, match="yardstick=on is neither no nor yes"):
        maze.get_config("yardstick=on")
    with pytest.raises(UserError, match="an odd number from 5 to 29"):
        make_condition(resolve(maze.get_config("rooms=2"))).source()
