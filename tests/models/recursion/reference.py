"""The mechanism in plain float64 NumPy: loops over images, tokens, experts and latent steps.

It is written from the equations, not from the JAX code, and only checks that code.
"""

import fractions
import math
import typing

import numpy as np


def layer_norm(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def gelu(x):
    """By its tanh approximation."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x * x) + 1e-6) * scale


def route(h, timestep, condition, gate, config, gumbel):
    """One token's decision for each choice, lists of (expert, weight), and the probabilities [P, M]."""
    inputs = config.gate_inputs.split(",")
    _, choices, experts = gate["token_kernel"].shape
    decisions, probabilities = [], np.zeros((choices, experts))
    for p in range(choices):
        z = np.zeros(experts)
        for m in range(experts):
            if "tokens" in inputs:
                z[m] += layer_norm(h) @ gate["token_kernel"][:, p, m]
            if "timestep" in inputs:
                z[m] += timestep @ gate["condition_kernel"][:, p, m]
            if "condition" in inputs:
                z[m] += condition @ gate["condition_kernel"][:, p, m]
        if gumbel is not None:
            z = z + gumbel[p]
        z = z / config.temperature
        probability = softmax(z)
        chosen = sorted(range(experts), key=lambda m: -z[m])[: config.experts_per_token]
        total = sum(probability[m] for m in chosen)
        if config.forward_weight == "straight_through":
            decisions.append([(m, probability[m] / total) for m in chosen])
        else:
            decisions.append([(m, probability[m]) for m in chosen])
        probabilities[p] = probability
    return decisions, probabilities


def drop_over_capacity(decisions, probabilities, config):
    """Keeps, for each routing group, choice and expert, the tokens of highest probability, the earlier one at a tie."""
    images, tokens = len(decisions), len(decisions[0])
    group = min(config.routing_group, images)
    size = group * tokens
    factor = fractions.Fraction(str(config.capacity_factor))
    capacity = min(size, math.ceil(factor * config.experts_per_token * size / config.experts))
    kept = [[[[] for _ in choices] for choices in image] for image in decisions]
    for first in range(0, images, group):
        flat = [(b, n) for b in range(first, first + group) for n in range(tokens)]
        for p in range(len(decisions[0][0])):
            for m in range(config.experts):
                takers = [(b, n) for b, n in flat if any(e == m for e, _ in decisions[b][n][p])]
                takers.sort(key=lambda bn: -probabilities[bn[0]][bn[1]][p][m])  # stable: ties by position
                for b, n in takers[:capacity]:
                    kept[b][n][p] += [(e, w) for e, w in decisions[b][n][p] if e == m]
    return kept


def attention(qkv, heads, norms, context):
    """[N, 3, D] of one image -> [N, D]; norms is a list of scales of q and k, applied in turn.

    context is (keys, values) [L, H, d], or None.
    """
    tokens, _, width = qkv.shape
    d = width // heads
    out = np.zeros((tokens, width))
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        queries, keys, values = (list(qkv[:, i, part]) for i in range(3))
        for query_scale, key_scale in norms:
            queries = [rms_norm(q, query_scale) for q in queries]
            keys = [rms_norm(k, key_scale) for k in keys]
        if context is not None:
            keys += list(context[0][:, head])
            values += list(context[1][:, head])
        for n in range(tokens):
            weights = softmax(np.array([queries[n] @ key for key in keys]) / math.sqrt(d))
            out[n, part] = sum(w * value for w, value in zip(weights, values, strict=True))
    return out


def attention_entropy(qkv, heads, norms, context):
    """[N, 3, D] of one image -> mean entropy of its attention over the logarithm of its length."""
    tokens, _, width = qkv.shape
    d, found = width // heads, []
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        queries, keys = (list(qkv[:, i, part]) for i in range(2))
        for query_scale, key_scale in norms:
            queries = [rms_norm(q, query_scale) for q in queries]
            keys = [rms_norm(k, key_scale) for k in keys]
        keys += [] if context is None else list(context[0][:, head])
        for query in queries:
            weights = softmax(np.array([query @ key for key in keys]) / math.sqrt(d))
            found.append(-sum(w * math.log(w) for w in weights) / math.log(len(keys)))
    return np.mean(found)


def chance_to_stop(state, head):
    """lambda of the learned halting head (kernel [D], bias) for one token's state."""
    kernel, bias = head
    return 1 / (1 + math.exp(-(layer_norm(state) @ kernel + bias)))


def has_stopped(states, config, head):
    """Whether a token whose states so far are a_0 .. a_t has stopped."""
    if config.halting == "none":
        return False
    if config.halting == "convergence":
        pairs = list(zip(states[:-1], states[1:], strict=True))[-config.halting_patience :]
        small = [np.linalg.norm(b - a) < config.halting_epsilon * np.linalg.norm(b) for a, b in pairs]
        return len(small) == config.halting_patience and all(small)
    survival = 1.0
    for state in states:
        survival *= 1 - chance_to_stop(state, head)
    return survival <= 0.5


def expected_state(states, config, head):
    """The learned rule in training: sum of p_t a_t over a token's states a_0 .. a_{T-1}, and KL(p || prior)."""
    expected, divergence, survival = np.zeros_like(states[0]), 0.0, 1.0
    for t, state in enumerate(states):
        last = t == len(states) - 1
        p = survival if last else survival * chance_to_stop(state, head)
        prior = (1 - config.halting_prior) ** t * (1.0 if last else config.halting_prior)
        expected = expected + p * state
        divergence += p * math.log(p / prior)
        survival -= p
    return expected, divergence


class Result(typing.NamedTuple):
    qkv: np.ndarray  # [B, N, 3, D] that the block's own attention sees
    running: list  # [T] share of the tokens that each latent step is computed for
    divergence: float  # mean KL(p || prior) of the learned halting in training, else 0
    updates: list  # [T] of the experts' update of q, k, v [B, N, 3, D]
    trajectory: list  # [T - 1] of (q, k, v as they are attended with [B, N, 3, D], the states after it [B, N, D])


def recursion(
    x, shift, scale, timestep, condition, pools, base, heads, config, *, steps, gumbel, norms, context, head, forms,
    mlp_gumbel=None, fixed=None,
):  # fmt: skip
    """The latent steps on modulated tokens x [B, N, D].

    pools: a list of {"token_kernel", "condition_kernel" [D, P, M], "down" and "up" [3, M, r, D]}, one, or one
    for each latent step. base: (kernel [D, 3 D], bias [3 D]). gumbel: [T, B, N, P, M], or None at inference.
    context: (keys, values) [B, L, H, d] of the text, or None. head: (kernel [D], bias) of the learned halting, or None.
    forms: {name: array} of the parameters of models/recursion/forms.py, and "expert_mlp", those of expert_mlp.py.
    mlp_gumbel: like gumbel, of the expert MLP's gate.
    fixed: None, or what truncation makes constants of the gradient: a_0 and the start of a trajectory, taken as given.
    """
    images, tokens, width = x.shape
    kernel, bias = base
    every_token = [(b, n) for b in range(images) for n in range(tokens)]

    def project(a):
        return (a @ kernel + bias).reshape(images, tokens, 3, width)

    def modulated(token, b, n):
        h = layer_norm(token) if config.normalization else token
        if config.modulation:
            h = h * (1 + scale[b]) + shift[b]
        return h + x[b, n] if config.residual == "after_norm" else h

    def refine(a, t, asking):
        """h, and the update of q, k and v, zero for tokens that ask for none."""
        pool = pools[t] if len(pools) > 1 else pools[0]
        choices = pool["token_kernel"].shape[1]
        h, qkv = np.zeros_like(x), np.zeros((images, tokens, 3, width))
        decisions = [[[[] for _ in range(choices)] for _ in range(tokens)] for _ in range(images)]
        probabilities = [[None] * tokens for _ in range(images)]
        for b, n in every_token:
            h[b, n] = modulated(a[b, n], b, n)
            of_h, of_gate = 0, 0
            if config.step_embedding:
                of_h, of_gate = forms["step_embedding"][min(t, config.latent_steps - 1)]
            h[b, n] = h[b, n] + of_h
            noise = None if gumbel is None else gumbel[t][b, n]
            decision, probabilities[b][n] = route(h[b, n], timestep[b] + of_gate, condition[b], pool, config, noise)
            if asking[b, n]:
                decisions[b][n] = decision
        if gumbel is not None:
            decisions = drop_over_capacity(decisions, probabilities, config)
        for b, n in every_token:
            for projection in range(3):
                for m, weight in decisions[b][n][projection if choices == 3 else 0]:
                    low = pool["down"][projection, m] @ h[b, n]
                    low = low if config.alpha is None else config.alpha / config.rank * low
                    qkv[b, n, projection] += weight * (low @ pool["up"][projection, m])
        return h, qkv

    own, of_base = (
        [(forms["query_scale"], forms["key_scale"])] if config.attention_qk_norm else [],
        [norms] if norms else [],
    )
    step_norms = own + of_base

    def mlp(h, b, n, t):
        """What the expert MLP adds to one token's state, from its h."""
        weights = forms["expert_mlp"]
        noise = None if mlp_gumbel is None else mlp_gumbel[t][b, n]
        (chosen,), _ = route(h, timestep[b], condition[b], weights, config, noise)
        return sum(w * gelu(weights["down"][m] @ h) @ weights["up"][m] for m, w in chosen)

    averaged = config.halting == "learned" and gumbel is not None  # no token stops, and all states of it count
    start, constants = (x, []) if fixed is None else fixed
    states = [[[start[b, n]] for n in range(tokens)] for b in range(images)]
    qkv, shares, updates, trajectory = np.zeros((images, tokens, 3, width)), [], [], []
    for t in range(steps - 1):
        running = np.array([[averaged or not has_stopped(token, config, head) for token in image] for image in states])
        shares.append(running.mean())
        asking = running | (t == 0)  # a token that stops at once shows the keys and values of its first state
        h, update = refine(np.array([[token[-1] for token in image] for image in states]), t, asking)
        updates.append(update.copy())
        if config.base_every_step:
            now = np.array([[token[-1] for token in image] for image in states])
            added = project(h if config.base_step_input == "h" else x + forms["blend"] * (now - x))
            for i, name in enumerate("qkv"):
                if name in config.base_projections:
                    update[:, :, i] += added[:, :, i]
        qkv[asking] = update[asking]
        if t < len(constants):
            qkv = constants[t][0].copy()
        for b in range(images):
            text = None if context is None else (context[0][b], context[1][b])
            attended = attention(qkv[b], heads, step_norms, text)
            for n in range(tokens):
                if config.attended_norm:
                    attended[n] = rms_norm(attended[n], forms["gain"])
                if running[b, n]:
                    before = states[b][n][-1]
                    state = attended[n] + (x[b, n] if config.residual == "before_norm" else 0)
                    if config.state == "accumulate":
                        state = before + attended[n] * (1 if config.attended_norm else forms["gain"])
                    if config.state == "gated":
                        z = 1 / (1 + np.exp(-(h[b, n] @ forms["gate_kernel"] + forms["gate_bias"])))
                        state = (1 - z) * before + z * state
                    if config.expert_mlp:
                        state = state + mlp(modulated(state, b, n), b, n, t)
                    states[b][n].append(constants[t][1][b, n] if t < len(constants) else state)
        trajectory.append((qkv.copy(), np.array([[token[-1] for token in image] for image in states])))
    a, divergence = np.array([[token[-1] for token in image] for image in states]), 0.0
    if averaged:
        for b, n in every_token:
            a[b, n], one = expected_state(states[b][n], config, head)
            divergence += one / (images * tokens)
    _, update = refine(a, steps - 1, np.ones((images, tokens), bool))
    base_input = {"modulated": x, "carry": a + x}.get(config.base_input)
    if base_input is None:
        base_input = x + forms["blend"] * (a - x)
    return Result(project(base_input) + update, [*shares, 1.0], divergence, [*updates, update], trajectory)
