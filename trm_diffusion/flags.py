"""Every flag, and the errors about them: `parse` turns a command line into flags that go together.

`--config` names the experiment; `--mode` the job (jobs/table.py).
"""

import re

from absl import flags
from etils import epath
from ml_collections import config_flags

from trm_diffusion.errors import UserError
from trm_diffusion.jobs.table import JOBS

PLATFORMS = ("", "cpu", "cuda", "tpu")
FILE_MODES = ("evaluate", "reference")  # the modes that read --images

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment: configs/NAME.py or configs/NAME.py:OPTION=VALUE,..."
)
flags.DEFINE_enum("mode", "train", tuple(JOBS), "train (then sample and evaluate), or one job alone")
flags.DEFINE_string("workdir", None, "Directory of the run, runs/NAME by default; may be gs://...")

flags.DEFINE_multi_string("prompt", [], "sample: text to draw; may be given several times")
flags.DEFINE_string(
    "prompts",
    None,
    'sample, encode: file of prompts, one a line or JSON lines with "prompt" (.jsonl), or a folder of .txt files',
)
flags.DEFINE_enum(
    "export", "", ("", "geneval", "dpg"), "sample: draw the benchmark's --prompts, in its official layout"
)
flags.DEFINE_integer("num", 0, "sample: number of images to draw as PNG files, in place of a grid")
flags.DEFINE_string(
    "out",
    None,
    "What to write: samples (folder or .npz), evaluation, reference or comparison; the directory of prepare or encode",
)

flags.DEFINE_string("images", None, "evaluate, reference: folder or .npz of images")
flags.DEFINE_integer("image_size", 0, "evaluate, reference: crop the images to this size first, as ADM does")
flags.DEFINE_string("reference", None, "evaluate: reference .npz that --images are compared with")
flags.DEFINE_string(
    "inception", None, "evaluate, reference: weights of the FID Inception network: .safetensors, .pth, or converted"
)
flags.DEFINE_enum(
    "precision_recall_dtype",
    "float32",
    ("float32", "float16"),
    "evaluate: dtype of the pairwise feature distances behind precision and recall",
)
flags.DEFINE_list("evaluations", None, "compare: evaluation.json files, separated by commas")

flags.DEFINE_string("from", "", "convert: a run, a converted directory, published weights, or a hub id")
flags.DEFINE_string("to", "", "convert: the directory to write")
flags.DEFINE_string("layout", "", "convert: layout of the published weights, where their names do not tell")
flags.DEFINE_string(
    "to-layout",
    "",
    "convert: write published names, or adapter (gates and experts alone), in place of a directory to start from",
)
flags.DEFINE_enum(
    "dtype", "", ("", "float32", "float16", "bfloat16"), "convert: dtype of the result; the source's by default"
)
flags.DEFINE_bool("merge", False, "convert: merge a plain LoRA into the base weights first")

flags.DEFINE_integer("images_per_shard", None, "prepare, encode: images in a shard; 5,000 and 100 by default")
flags.DEFINE_string("topology", "", "compile: TPU pod to compile for, such as v5p:4x4x4")
flags.DEFINE_integer("slices", 1, "compile: number of slices of that pod, with a copy of the model on each")
flags.DEFINE_enum("job", "train", ("train", "sample"), "compile: whose step to compile")

flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0, for a run of several processes; found by itself on TPU pods and SLURM",
)
flags.DEFINE_integer(
    "process_index",
    None,
    "Index of this process in the run, or, without a coordinator, among those that share a prepare or encode",
)
flags.DEFINE_integer("process_count", None, "Total number of processes")
flags.DEFINE_enum("cluster", "auto", ("auto", "none"), "none: do not look for other processes in a cluster")
flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for all processes of the run to connect")
flags.DEFINE_string(
    "compilation_cache",
    "",
    "Directory of compiled programs, or none; .compilation_cache beside the workdir by default",
)
flags.DEFINE_enum("platform", "", PLATFORMS, "Refuse to run on anything else; any device by default")


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of a command line. Raises UserError for anything wrong in them or in the config file they name."""
    try:
        rest = flags.FLAGS(argv)[1:]
        _ = CONFIG.value and CONFIG.value.to_dict()  # a file that cannot be read is noticed only here
    except Exception as error:  # noqa: BLE001  whatever the libraries raise, the command line is what is wrong
        raise _explained(error, argv) from None
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; write --name=value (see --help)")
    _check_together(flags.FLAGS)
    return flags.FLAGS


def _check_together(options: flags.FlagValues) -> None:
    """Raises UserError for flags that do not go together."""
    mode, prompts = options.mode, options.prompt or options.prompts
    if options.images and mode not in FILE_MODES:
        raise UserError(f"--images goes with --mode=evaluate and --mode=reference, not with {mode}")
    if options.export and (mode != "sample" or not options.prompts or options.prompt or options.num):
        raise UserError(f"--export={options.export} goes with --mode=sample and --prompts, the benchmark's own, alone")
    if options.prompt and mode != "sample":
        raise UserError("--prompt and --prompts are for --mode=sample")
    if options.prompts and mode not in ("sample", "encode"):
        raise UserError("--prompts is for --mode=sample and --mode=encode")
    if options.num and (mode != "sample" or options.num < 0 or prompts):
        raise UserError(f"--num={options.num} counts images; it goes with --mode=sample, and not with prompts")


def _explained(error: Exception, argv: list[str]) -> UserError:
    """A library's error about the command line or the config file, as one line that says what to do."""
    from trm_diffusion.config import field_exists, unknown_field

    text, command = str(error), "\n".join(argv)
    for path in re.findall(r"^--?(config\.[\w.]+)", command, re.MULTILINE):
        if not field_exists(path):
            return unknown_field(path)
    file = (re.findall(r"^--?config[=\n]([^:\n]+)", command, re.MULTILINE) or [""])[0]
    if file and not epath.Path(file).exists():
        return UserError(f"--config={file}: no such file; the experiments are in configs/")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if "whilst parsing config file" in text:  # the library quotes the whole traceback; its last line is the reason
        reason = lines[-1].removeprefix("trm_diffusion.errors.UserError: ")
        if "positional argument" in reason:
            reason = "this experiment takes no options after the colon"
        return UserError(f"{file}: {reason}")
    return UserError(lines[0])
