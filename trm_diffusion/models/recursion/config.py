"""The settings of the recursion: the paper's, and switches where the sources leave a choice."""

import dataclasses

from trm_diffusion.models.remat import POLICIES
from trm_diffusion.models.settings import Settings, setting

PROJECTIONS = 3  # q, k, v
DISPATCH = ("auto", "dense", "capacity", "one_hot")
GATE_INPUTS = ("tokens", "timestep", "condition")


@dataclasses.dataclass(frozen=True)
class RecursionConfig(Settings):
    """Every default is the paper's setting, or our reading where the paper leaves it open."""

    blocks: str = "none"  # which blocks recurse: none, middle, all, or indices such as "4,8,12"
    # instead of all below but T: these blocks run T times, all their weights, without experts (recursion/looped.py)
    looped: bool = False
    latent_steps: int = setting(2, least=1)  # T
    experts: int = setting(2, least=1)  # M, low-rank experts in a block's pool
    experts_per_token: int = setting(1, least=1)  # k, at most M
    rank: int = setting(128, least=1)  # r of the low-rank maps
    alpha: float | None = setting(None, above=0)  # low-rank updates are scaled by alpha / rank; None does not scale
    init_down: float = setting(1.0, least=0)  # standard deviation of A at the start, in units of width^-1/2
    init_up: float = setting(0.0, least=0)  # of B, in units of rank^-1/2; 0: the block starts as its base
    temperature: float = setting(5.0, least=1e-3)  # tau of the gate's softmax in training
    capacity_factor: float = setting(1.25, least=0.01)  # room per expert in training, relative to an even split
    routing_group: int = setting(8, least=1)  # images whose tokens compete for the experts; divides a device's batch
    gate_inputs: str = setting("tokens,timestep,condition", some_of=GATE_INPUTS)  # what the gate sees, any subset
    # straight_through: weights are exactly 1 at k = 1; soft: the gate's probabilities
    forward_weight: str = setting("straight_through", choices=("straight_through", "soft"))
    # what the base projection sees: x~ (modulated), a_{T-1} + x~ (carry, figure 1), or x~ + g (a_{T-1} - x~) (blend)
    base_input: str = setting("modulated", choices=("modulated", "carry", "blend"))
    normalization: bool = True  # h starts from LN(a); False takes a as it is: at T = M = 1 without Mod a plain LoRA
    modulation: bool = True  # Mod is the block's shift and scale; False leaves it out
    # x~ joins a before the norm, or h after it (figure 1)
    residual: str = setting("before_norm", choices=("before_norm", "after_norm"))
    pool: str = setting("shared", choices=("shared", "per_latent_step"))  # one pool and gate for all latent steps?
    routing_scope: str = setting("shared", choices=("shared", "per_projection"))  # one choice for q, k and v, or three
    # a_t: Attn + x~ (restart), a_{t-1} + g Attn (accumulate), or a learned mean of a_{t-1} and Attn + x~ (gated)
    state: str = setting("restart", choices=("restart", "accumulate", "gated"))
    attended_gain: float = 1.0  # initial value of g
    attended_norm: bool = False  # g RMSNorm(Attn) joins the state instead of Attn
    attention_qk_norm: bool = False  # RMS-normalise q and k of the intermediate attention, whatever the base does
    step_embedding: bool = False  # add a learned embedding of the latent step's index to h and to the gate's y
    expert_mlp: bool = False  # a low-rank expert MLP after the intermediate attention (recursion/expert_mlp.py)
    base_every_step: bool = False  # also add the base projection in the intermediate latent steps
    # base_every_step: the base projection of h_t, or of x~ + g (a_{t-1} - x~) (blend)
    base_step_input: str = setting("h", choices=("h", "blend"))
    base_projections: str = setting("q,k,v", some_of=("q", "k", "v"))  # base_every_step: what the base adds to
    dispatch: str = setting("auto", choices=DISPATCH)  # how tokens reach their experts
    remat: str = setting("full", choices=POLICIES)  # what the backward pass keeps (with T = 2, full keeps products too)
    scan_latent_steps: bool = True  # one scan over the latent steps (compiles once); False unrolls
    truncated_latent_steps: int = setting(0, least=0)  # how many of the first latent steps pass no gradient
    switch_loss_weight: float = setting(0.0, least=0)  # weight of the Switch load-balance loss; the paper names none
    z_loss_weight: float = setting(0.0, least=0)  # weight of the router z-loss
    balance_bias_rate: float = setting(0.0, least=0)  # loss-free balance: step of the selection bias per update
    # which tokens stop early: none; those whose state has converged (no parameters); those that a learned head stops
    halting: str = setting("none", choices=("none", "convergence", "learned"))
    halting_epsilon: float = setting(0.05, least=0)  # convergence: relative change of a below which a token is settled
    halting_patience: int = setting(1, least=1)  # convergence: for how many latent steps in a row
    halting_prior: float = setting(0.3, above=0, below=1)  # learned: geometric prior's chance to stop at a latent step
    halting_weight: float = setting(0.01, least=0)  # learned: weight of KL(p || prior) in the loss

    def __post_init__(self):
        super().__post_init__()
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} exceeds experts {self.experts}")
        if self.looped and self.halting != "none":
            raise ValueError(f"halting is {self.halting!r}; with looped there is none: every token runs T loops")


def recursive_blocks(blocks: str, depth: int) -> tuple[int, ...]:
    """The block indices that `RecursionConfig.blocks` names, counted from 0. Raises ValueError with one clear line."""
    if blocks == "none":
        return ()
    if blocks == "all":
        return tuple(range(depth))
    if blocks == "middle":
        return (depth // 2,)
    try:
        indices = tuple(sorted({int(index) for index in blocks.split(",")}))
    except ValueError:
        raise ValueError(f'"{blocks}" is none of none, middle, all, or block indices such as "4,8,12"') from None
    outside = [index for index in indices if not 0 <= index < depth]
    if outside:
        raise ValueError(f'"{blocks}" names block {outside[0]}; a model of depth {depth} has blocks 0 to {depth - 1}')
    return indices
