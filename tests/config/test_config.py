"""Every mistake in a config or on the command line ends in one line and exit code 2, before any device is touched."""

import dataclasses
import json

import pytest

from tests.commands import parsed
from trm_diffusion import config as config_module
from trm_diffusion.config import default_config, fields_of, resolve, to_dict, variant
from trm_diffusion.errors import UserError
from trm_diffusion.models.recursion import RecursionConfig

DIGITS = "--config=configs/digits.py"
POOLS_WITH_BIAS = "--config.model.recursion.pool=per_latent_step --config.model.recursion.balance_bias_rate=0.1"
MALFORMED = [  # the flags after --config=configs/digits.py, and what the one line must say
    ("--config.optim.lrr=1", "did you mean config.optim.lr?"),
    ("--config.modle.depth=3", "did you mean config.model.depth?"),
    ("--config.sampel.guidance=2", "did you mean config.sample.guidance?"),
    ("--config.train.batchsize=64", "did you mean config.train.batch_size?"),
    ("--config.model.recursion.latent_step=2", "did you mean config.model.recursion.latent_steps?"),
    ("--config.model.recursion.expert=2", "did you mean config.model.recursion.experts?"),
    ("--config.train.lr=1", "did you mean config.optim.lr?"),
    ("--config.modle.dpth=3", "did you mean config.model?"),
    ("--config.mesh.colour=3", "config.mesh has data, "),
    ("--config.seed.first=3", "config.seed is one"),
    ("--config.optim.lr=fast", "config.optim.lr"),
    ("--config.optim.lr=-1", "config.optim.lr is -1"),
    ("--config.optim.schedule=cosign", "config.optim.schedule"),
    ("--config.optim.optimizer=adam", "config.optim.optimizer"),
    ("--config.optim.b2=1.0", "config.optim.b2"),
    ("--config.optim.clip_norm=-1.0", "config.optim.clip_norm"),
    ("--config.optim.ema_decays=1.5", "config.optim.ema_decays is (1.5,); each must be in [0, 1)"),
    ("--config.optim.ema_decays=abc", "config.optim.ema_decays"),
    ("--config.optim.warmup_steps=-5", "config.optim.warmup_steps"),
    ("--config.train.updates=0", "config.train.updates"),
    ("--config.train.updates=many", "config.train.updates"),
    ("--config.train.updates=1.5", "config.train.updates"),
    ("--config.train.batch_size=0", "config.train.batch_size"),
    ("--config.train.batch_size=130 --config.train.accumulate=4", "config.train.batch_size 130"),
    ("--config.train.batch_size=128 --config.mesh.data=3", "config.train.batch_size 128"),
    ("--config.train.label_dropout=1.0", "config.train.label_dropout"),
    ("--config.train.latent_steps=3,1", "config.train.latent_steps"),
    ("--config.train.latent_steps=0", "config.train.latent_steps"),
    ("--config.train.latent_steps=1,9", "config.train.latent_steps"),
    (f"{POOLS_WITH_BIAS} --config.train.latent_steps=1", "moves the bias of every pool: leave it out, or give 2"),
    (f"{POOLS_WITH_BIAS} --config.train.latent_steps=1,2", "moves the bias of every pool"),
    ("--config.model.heads=5", "config.model.heads"),
    ("--config.model.heads=0", "config.model.heads"),
    ("--config.model.depth=0", "config.model.depth"),
    ("--config.model.width=130 --config.model.heads=2", "multiple of 4"),
    ("--config.model.patch=3", "config.model.patch"),
    ("--config.model.dtype=float8", "config.model.dtype"),
    ("--config.model.remat=some", "config.model.remat"),
    ("--config.model=3", "config.model"),
    ("--config.model.qk_norm=perhaps", "config.model.qk_norm"),
    ("--config.model.recursion.experts_per_token=3", "config.model.recursion.experts_per_token 3 exceeds"),
    ("--config.model.recursion.latent_steps=0", "config.model.recursion.latent_steps"),
    ("--config.model.recursion.blocks=4,9", "names block"),
    ("--config.model.recursion.blocks=some", "config.model.recursion.blocks"),
    ("--config.model.recursion.gate_inputs=tokens,time", "config.model.recursion.gate_inputs"),
    ("--config.model.recursion.forward_weight=hard", "config.model.recursion.forward_weight"),
    ("--config.model.recursion.routing_group=7", "config.model.recursion.routing_group 7"),
    ("--config.model.recursion.temperature=0.0", "config.model.recursion.temperature"),
    ("--config.model.recursion.dispatch=fast", "config.model.recursion.dispatch"),
    ("--config.diffusion.objective=score", "objective"),
    ("--config.diffusion.learned_sigma=true", "learned_sigma"),
    ("--config.diffusion.beta_start=0.5", "config.diffusion.beta_start 0.5 exceeds"),
    ("--config.sample.sampler=ddpm", "ddpm"),
    ("--config.sample.sampler=dpm", "sampler"),
    ("--config.sample.latent_steps=0", "config.sample.latent_steps"),
    ("--config.sample.classes=3,11", "labels go from 0 to 9"),
    ("--config.sample.guidance_channels=first", "config.sample.guidance_channels"),
    ("--config.sample.guidance_interval=0.9,0.1", "guidance interval"),
    ("--config.sample.guidance_interval=0.5", "config.sample.guidance_interval"),
    ("--config.sample.eta=0.5", "eta"),
    ("--config.sample.parameters=0.9", "config.sample.parameters"),
    ("--config.data.source=imagenet", "config.data.source"),
    ("--config.data.workers=-1", "config.data.workers"),
    ("--config.data.source=synthetic", "config.evaluate.kind"),
    ("--config.evaluate.kind=fid", "config.evaluate.kind"),
    ("--config.mesh.tensor=3", "config.mesh.tensor"),
    ("--config.seed=-1", "config.seed"),
    ("--config.checkpoint.keep=0", "config.checkpoint.keep is 0; it must be at least 1"),
    ("--config.mesh.data=0", "config.mesh.data is 0; it must be -1 or at least 1"),
    ("--config.model.architecture=unet", "config.model.architecture"),
    ("--config.model.architecture=mmdit", "needs captions"),
    ("--config.model.architecture=mmdit --config.model.text.encoder=encoded", "needs encoded text"),
    ("--config.model.text.encoder=clip", "config.model.text.encoder"),
    ("--config.model.text.recipe=sd4", "config.model.text.recipe"),
    ("--config.model.text.pretrained_dtype=int8", "config.model.text.pretrained_dtype"),
    ("--config.data.text=encodings", "config.data.text needs config.model.architecture mmdit"),
    ("--mode=sample --export=geneval", "--prompts"),
    ("--mode=sample --export=parti --prompts=a", "export"),
    ("--export=dpg --prompts=a", "--mode=sample"),
    ("--config.data.num_classes=0", "needs labels"),
    ("--prompt=a", "--mode=sample"),
    ("--context=maze.png", "--context=maze.png goes with --mode=sample"),
    (
        "--mode=sample --context=maze.png --num=1 --out=a",
        "--context=maze.png goes with --mode=sample or --mode=trace, and not with",
    ),
    (
        "--config.data.context_channels=3 --config.data.source=synthetic",
        "needs context images: config.data.source one of",
    ),
    ("--config.data.context_channels=-1", "config.data.context_channels is -1; it must be at least 0"),
    ("--prompts=nowhere.txt --mode=sample", "no such file"),
    ("--mode=trane", "mode"),
    ("--platform=gpu", "platform"),
    ("--bogus=1", "bogus"),
    ("stray", "stray"),
]
OTHER_COMMANDS = [
    ("--config=configs/none.py", "no such file"),
    ("--config=configs/digits.py:model=S/2", "takes no options"),
    ("--config=configs/imagenet256.py:model=Q/2", "Q/2"),
    ("--config=configs/imagenet256.py:modle=S/2", "modle=S/2"),
    ("--config=configs/imagenet256.py:recursion=maybe", "maybe"),
    ("--config=configs/sd3_medium.py:recursion=30", "names block"),
    ("--config=configs/sd3_medium.py --config.model.architecture=dit --config.data.source=scenes", "needs labels"),
    ("--config=configs/scenes32.py --config.model.mmdit.dual_attention_blocks=9", "dual_attention_blocks 9"),
    ("--config=configs/scenes32.py --config.model.mmdit.position_max_size=4", "8 tokens a side"),
    ("--config=configs/scenes32.py --config.model.text.heads=3", "config.model.text.heads 3"),
    ("--config=configs/scenes32.py --config.model.text.pooled_features=2", "config.model.text.pooled_features 2"),
    ("--config=configs/scenes64.py --config.model.recursion.blocks=12", "names block"),
    ("--config=configs/sd3_medium.py --config.model.text.length=77 --config.data.text=texts", "text.length is 77"),
    ("--config=configs/sd3_medium.py --config.data.source=digits", "images without captions"),
    ("--config=configs/scenes32.py --config.model.text.encoder=encoded", "config.evaluate.kind scenes"),
    ("--mode=encode --prompts=a", "--mode=encode needs --config"),
    ("--config=configs/scenes32.py --config.data.context_channels=3", "needs context images"),
    ("--config=configs/maze.py:recursion=on", "recursion=on is none of off, paper, live"),
    ("--config=configs/maze.py:rooms=four", "rooms=four: give the number"),
    ("--config=configs/maze.py --config.data.num_classes=0", "config.data.num_classes is 0; it is 1"),
    ("--config=configs/maze.py --config.data.text=texts", "config.data.text needs"),
    ("--config=configs/maze.py --config.evaluate.kind=digits", "config.evaluate.kind digits"),
    ("--mode=train", "--mode=train needs --config"),
    ("--config.model.depth=3", "config.model.depth"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    commands = [f"{DIGITS} {flags}" for flags, _ in MALFORMED] + [command for command, _ in OTHER_COMMANDS]
    return parsed([f"{command} --workdir={tmp_path_factory.mktemp('run')}/none" for command in commands])


CASES = MALFORMED + OTHER_COMMANDS


@pytest.mark.parametrize("index", range(len(CASES)), ids=[flags for flags, _ in CASES])
def test_malformed_command(outcomes, index):
    code, text = outcomes[index]
    line, devices = text.strip().splitlines()
    assert code == 2
    assert line.startswith("error: ") and CASES[index][1] in line
    assert devices == "devices touched: False"


def test_at_least_fifty_malformed_configs():
    assert len({flags for flags, _ in MALFORMED}) >= 50


def test_default_config_resolves_to_the_defaults():
    assert resolve(default_config()) == config_module.Config()


FREE = {  # fields that accept any value of their type, or that only rules check
    "name", "model.recursion.blocks", "model.recursion.attended_gain", "optim.lr_multipliers",
    "model.text.pretrained", "model.text.revision", "diffusion.logit_mean",
    "data.text", "data.path", "data.tfds_name", "data.split", "data.vae", "train.latent_steps", "train.trainable",
    "init.workdir", "init.adapter", "init.missing", "sample.guidance", "sample.parameters",
    "evaluate.min_class_accuracy", "evaluate.min_judge_accuracy", "evaluate.min_strict_score",
}  # fmt: skip


def test_every_field_states_what_it_takes_or_is_free():
    silent = {
        path.removeprefix("config.")
        for path, field in fields_of()
        if "allowed" not in field.metadata and field.type is not bool and not dataclasses.is_dataclass(field.type)
    }
    assert silent == FREE


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(latent_steps=0), "latent_steps is 0; it must be at least 1"),
        (dict(residual="both"), "residual is 'both'; choose one of before_norm, after_norm"),
        (dict(halting_prior=1.0), r"halting_prior is 1.0; it must be in \(0, 1\)"),
        (dict(experts_per_token=3), "experts_per_token 3 exceeds experts 2"),
    ],
)
def test_a_part_of_the_config_refuses_without_the_rest(change, says):
    with pytest.raises(ValueError, match=says):
        RecursionConfig(**change)


def test_a_resolved_config_survives_json():
    config = resolve(default_config())
    assert resolve(json.loads(json.dumps(to_dict(config)))) == config


def test_wrong_types_are_named():
    values = default_config()
    values.unlock()
    for path, value, message in [
        ("optim", 3, "group of fields"),
        ("seed", "one", "takes a int"),
        ("seed", True, "takes a int"),
        ("name", 4, "takes a str"),
    ]:
        with pytest.raises(UserError, match=message):
            resolve({**values.to_dict(), path: value})


@pytest.mark.parametrize("latent_steps", [(), (2,)])
def test_a_pool_for_each_latent_step_is_balanced_where_all_of_them_run(latent_steps):
    values = default_config()
    values.model.recursion.update(pool="per_latent_step", balance_bias_rate=0.1, latent_steps=2)
    values.train.latent_steps = latent_steps
    assert resolve(values).train.latent_steps == latent_steps


def test_variant():
    assert variant("a=3", a="1", b="2") == {"a": "3", "b": "2"}
    assert variant(None, a="1") == {"a": "1"}
    with pytest.raises(UserError, match="a=1, b=2"):
        variant("c=3", a="1", b="2")
