"""All command-line flags and the errors about them; `parse` checks that the given flags go together.

`--config` selects the experiment and `--mode` the job (jobs/table.py).
"""

import re

from absl import flags
from ml_collections import config_flags

from trm_diffusion.errors import UserError
from trm_diffusion.jobs.table import JOBS
from trm_diffusion.readers.paths import any_path, expand

PLATFORMS = ("", "cpu", "cuda", "tpu")
FILE_MODES = ("evaluate", "reference")  # the modes that read --images
PATHS = (
    "workdir", "prompts", "context", "out", "images", "reference", "inception", "from", "to", "compilation_cache"
)  # fmt: skip

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "experiment file: configs/NAME.py or configs/NAME.py:OPTION=VALUE,..."
)
flags.DEFINE_enum("mode", "train", tuple(JOBS), "job to run; train also samples and evaluates at the end")
flags.DEFINE_string("workdir", None, "directory of the run, local or gs://...; runs/NAME by default")

flags.DEFINE_multi_string("prompt", [], "sample: text to draw; repeat the flag for several")
flags.DEFINE_string(
    "prompts",
    None,
    'sample, encode: file of prompts, one per line or .jsonl with "prompt" fields, or a folder of .txt files',
)
flags.DEFINE_string("context", None, "sample, trace: context images to draw from: a file, a folder of files, or .npy")
flags.DEFINE_enum(
    "export", "", ("", "geneval", "dpg"), "sample: write images of the benchmark's --prompts in its official layout"
)
flags.DEFINE_integer("num", 0, "sample: write this many images as PNG files instead of a grid")
flags.DEFINE_string(
    "out",
    None,
    "output path. sample: folder or .npz; evaluate: .json; reference: .npz; compare: .html; prepare, encode: folder. "
    "verify: folder to check",
)

flags.DEFINE_string("images", None, "evaluate, reference: folder or .npz of images")
flags.DEFINE_integer("image_size", 0, "evaluate, reference: crop images to this size first, as ADM does; 0 keeps them")
flags.DEFINE_string("reference", None, "evaluate: reference .npz to compare --images with")
flags.DEFINE_string(
    "inception", None, "evaluate, reference: FID Inception weights: .safetensors, .pth, or a directory from convert"
)
flags.DEFINE_enum(
    "precision_recall_dtype",
    "float32",
    ("float32", "float16"),
    "evaluate: dtype of the pairwise feature distances in precision and recall",
)
flags.DEFINE_list("evaluations", None, "compare: evaluation.json files, separated by commas")

flags.DEFINE_string("from", "", "convert: source weights: a run, a converted directory, published weights or a hub id")
flags.DEFINE_string("to", "", "convert: directory to write")
flags.DEFINE_string("layout", "", "convert: layout of the published weights; detected from their names by default")
flags.DEFINE_string(
    "to-layout",
    "",
    "convert: export with the names of this layout, or only gates and experts (adapter); by default, a directory that "
    "config.init.workdir reads",
)
flags.DEFINE_enum(
    "dtype", "", ("", "float32", "float16", "bfloat16"), "convert: dtype to write; the source's by default"
)
flags.DEFINE_bool("merge", False, "convert: first merge experts that are a plain LoRA into the base weights")

flags.DEFINE_integer(
    "images_per_shard", None, "prepare, encode: images (or prompts) per shard; by default 5,000 and 100"
)
flags.DEFINE_string("topology", "", "compile: TPU topology to compile for, such as v5p:4x4x4")
flags.DEFINE_integer("slices", 1, "compile: number of such slices; each holds a full copy of the model")
flags.DEFINE_enum("job", "train", ("train", "sample"), "compile: which step to compile")

flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0 in a run of several processes; detected on TPU pods and SLURM",
)
flags.DEFINE_integer(
    "process_index",
    None,
    "index of this process in the run; without --coordinator, among those that share a prepare or encode",
)
flags.DEFINE_integer("process_count", None, "total number of processes")
flags.DEFINE_enum("cluster", "auto", ("auto", "none"), "auto: detect the other processes in a cluster; none: do not")
flags.DEFINE_integer("start_timeout", 300, "seconds to wait for all processes of the run to connect")
flags.DEFINE_string(
    "compilation_cache",
    "",
    "directory that caches compiled programs, or none; .compilation_cache beside the workdir by default",
)
flags.DEFINE_enum("platform", "", PLATFORMS, "refuse to run on any other platform; accepts any by default")


def parse(argv: list[str]) -> flags.FlagValues:
    """Parses a command line. Raises UserError for any mistake in the flags or in the config file they name."""
    try:
        rest = flags.FLAGS(argv)[1:]
        _ = CONFIG.value and CONFIG.value.to_dict()  # a config file that cannot be read raises only here
    except Exception as error:  # noqa: BLE001  the libraries raise many types, and all mean a mistake in the command line
        raise _explained(error, argv) from None
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; write --name=value (see --help)")
    _check_together(flags.FLAGS)
    _expand_paths(flags.FLAGS)
    return flags.FLAGS


def _expand_paths(options: flags.FlagValues) -> None:
    """Expands `~` in every flag that holds a path. Raises UserError for a bucket that cannot be read here."""
    for name in PATHS:
        if options[name].value:
            any_path(options[name].value, f"--{name}")
            options[name].value = expand(options[name].value)
    if options.evaluations:
        options["evaluations"].value = [expand(path, "--evaluations") for path in options.evaluations]


def _check_together(options: flags.FlagValues) -> None:
    """Raises UserError for flags that do not go together."""
    mode = options.mode
    prompts = options.prompt or options.prompts
    if options.images and mode not in FILE_MODES:
        raise UserError(f"--images goes with --mode=evaluate or --mode=reference, not with --mode={mode}")
    if options.export and (mode != "sample" or not options.prompts or options.prompt or options.num):
        raise UserError(
            f"--export={options.export} needs --mode=sample and the benchmark's --prompts, and no --prompt or --num"
        )
    if options.prompt and mode != "sample":
        raise UserError(f"--prompt goes with --mode=sample, not with --mode={mode}")
    if options.prompts and mode not in ("sample", "encode"):
        raise UserError(f"--prompts goes with --mode=sample or --mode=encode, not with --mode={mode}")
    if options.context and (mode not in ("sample", "trace") or options.export or options.num):
        raise UserError(
            f"--context={options.context} goes with --mode=sample or --mode=trace, and not with --export or --num"
        )
    if options.num and (mode != "sample" or options.num < 0 or prompts):
        raise UserError(f"--num={options.num} must be at least 1 image, with --mode=sample and without prompts")


def _explained(error: Exception, argv: list[str]) -> UserError:
    """Turns a library's error about the command line or the config file into one line that says what to do."""
    from trm_diffusion.config import field_exists, unknown_field

    text = str(error)
    command = "\n".join(argv)
    for path in re.findall(r"^--?(config\.[\w.]+)", command, re.MULTILINE):
        if not field_exists(path):
            return unknown_field(path)
    file = (re.findall(r"^--?config[=\n]([^:\n]+)", command, re.MULTILINE) or [""])[0]
    if file and not any_path(file, "--config").exists():
        return UserError(f"--config={file}: no such file; the experiments are in configs/")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if "whilst parsing config file" in text:  # the error quotes a whole traceback, whose last line is the reason
        reason = lines[-1].removeprefix("trm_diffusion.errors.UserError: ")
        if "positional argument" in reason:
            reason = "this experiment takes no options after the colon"
        return UserError(f"{file}: {reason}")
    return UserError(lines[0])
