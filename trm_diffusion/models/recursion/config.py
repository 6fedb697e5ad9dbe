"""The settings of the recursion: the paper's, and the switches among the readings that the sources leave open."""

import dataclasses

PROJECTIONS = 3  # q, k, v
DISPATCH = ("auto", "dense", "capacity", "one_hot")
BASE_INPUTS = ("modulated", "carry")
RESIDUALS = ("before_norm", "after_norm")
POOLS = ("shared", "per_latent_step")
ROUTING_SCOPES = ("shared", "per_projection")


@dataclasses.dataclass(frozen=True)
class RecursionConfig:
    """Every default is the paper's setting, or our reading where the paper leaves it open."""

    blocks: str = "none"  # which blocks recurse: none, middle, all, or indices such as "4,8,12"
    latent_steps: int = 2  # T
    experts: int = 2  # M, low-rank experts in a block's pool
    experts_per_token: int = 1  # k
    rank: int = 128  # r of the low-rank maps
    temperature: float = 5.0  # tau of the gate's softmax in training
    capacity_factor: float = 1.25  # room per expert in training, relative to an even split
    routing_group: int = 8  # images whose tokens compete for the experts; divides each device's batch
    gate_inputs: str = "tokens,timestep,condition"  # what the gate sees, any subset
    forward_weight: str = "straight_through"  # straight_through (exactly 1 at k = 1) or soft
    base_input: str = "modulated"  # the base projection sees x~ (modulated) or a_{T-1} + x~ (carry, figure 1)
    normalization: bool = True  # h starts from LN(a); False takes a as it is: at T = M = 1 without Mod a plain LoRA
    modulation: bool = True  # Mod is the block's shift and scale; False leaves it out
    residual: str = "before_norm"  # x~ joins a before the norm, or h after it (after_norm, figure 1)
    pool: str = "shared"  # one pool and gate for all latent steps, or one per_latent_step
    routing_scope: str = "shared"  # one choice for q, k and v, or one per_projection
    base_every_step: bool = False  # also add the base projection of h_t in the intermediate latent steps
    dispatch: str = "auto"  # how tokens reach their experts: auto, dense, capacity or one_hot
    remat: str = "full"  # what the backward pass keeps: none, dots, full (T = 2 keeps its products even so)
    scan_latent_steps: bool = True  # run the latent steps under one scan (compiles once); False unrolls them
    truncated_latent_steps: int = 0  # the first so many latent steps pass no gradient
    switch_loss_weight: float = 0.0  # weight of the Switch load-balance loss; the paper names none
    z_loss_weight: float = 0.0  # weight of the router z-loss
    balance_bias_rate: float = 0.0  # loss-free balance: step of the selection bias per update; 0 has no bias
    halting: str = "none"  # which tokens stop early: none, convergence (no parameters), learned
    halting_epsilon: float = 0.05  # convergence: relative change of a below which a token counts as settled
    halting_patience: int = 1  # convergence: latent steps in a row it must be settled
    halting_prior: float = 0.3  # learned: chance to stop at each latent step under the geometric prior
    halting_weight: float = 0.01  # learned: weight of KL(p || prior) in the loss


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
