"""The mechanism in plain float64 NumPy: loops over images, tokens, experts and latent steps, no cleverness.

Written from the equations, not from the JAX code, and only ever read to check it.
"""

import math

import numpy as np


def layer_norm(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x * x) + 1e-6) * scale


def route(h, timestep, condition, gate, config, gumbel):
    """One token's decision for each choice: lists of (expert, weight) and the probabilities [P, M]."""
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
    capacity = min(size, math.ceil(config.capacity_factor * config.experts_per_token * size / config.experts))
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
    """[N, 3, D] of one image -> [N, D]; context is (keys, values) [L, H, d], or None."""
    tokens, _, width = qkv.shape
    d = width // heads
    out = np.zeros((tokens, width))
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        queries, keys, values = (list(qkv[:, i, part]) for i in range(3))
        if norms is not None:
            queries = [rms_norm(q, norms[0]) for q in queries]
            keys = [rms_norm(k, norms[1]) for k in keys]
        if context is not None:
            keys += list(context[0][:, head])
            values += list(context[1][:, head])
        for n in range(tokens):
            weights = softmax(np.array([queries[n] @ key for key in keys]) / math.sqrt(d))
            out[n, part] = sum(w * value for w, value in zip(weights, values, strict=True))
    return out


def recursion(x, shift, scale, timestep, condition, pools, base, heads, config, *, steps, gumbel, norms, context):
    """Modulated tokens x [B, N, D] -> the q, k, v that the block's own attention sees, [B, N, 3, D].

    pools: a list of {"token_kernel", "condition_kernel" [D, P, M], "down" [D, 3, M, r], "up" [3, M, r, D]}, one, or one
    for each latent step. base: (kernel [D, 3 D], bias [3 D]). gumbel: [T, B, N, P, M], or None at inference.
    context: (keys, values) [B, L, H, d] of the text, or None.
    """
    images, tokens, width = x.shape
    kernel, bias = base

    def refine(a, t):
        pool = pools[t] if len(pools) > 1 else pools[0]
        h = np.zeros_like(x)
        decisions = [[None] * tokens for _ in range(images)]
        probabilities = [[None] * tokens for _ in range(images)]
        for b in range(images):
            for n in range(tokens):
                h[b, n] = layer_norm(a[b, n]) if config.normalization else a[b, n]
                if config.modulation:
                    h[b, n] = h[b, n] * (1 + scale[b]) + shift[b]
                if config.residual == "after_norm":
                    h[b, n] = h[b, n] + x[b, n]
                noise = None if gumbel is None else gumbel[t][b, n]
                decisions[b][n], probabilities[b][n] = route(h[b, n], timestep[b], condition[b], pool, config, noise)
        if gumbel is not None:
            decisions = drop_over_capacity(decisions, probabilities, config)
        qkv = np.zeros((images, tokens, 3, width))
        for b in range(images):
            for n in range(tokens):
                for projection in range(3):
                    choice = projection if len(decisions[b][n]) == 3 else 0
                    for m, weight in decisions[b][n][choice]:
                        low = h[b, n] @ pool["down"][:, projection, m]
                        qkv[b, n, projection] += weight * (low @ pool["up"][projection, m])
        return h, qkv

    def project(tokens_bnd):
        return (tokens_bnd @ kernel + bias).reshape(images, tokens, 3, width)

    a = x.copy()
    for t in range(steps - 1):
        h, qkv = refine(a, t)
        if config.base_every_step:
            qkv = qkv + project(h)
        attended = np.stack(
            [
                attention(qkv[b], heads, norms, None if context is None else (context[0][b], context[1][b]))
                for b in range(images)
            ]
        )
        a = attended + x if config.residual == "before_norm" else attended
    _, update = refine(a, steps - 1)
    return project(x if config.base_input == "modulated" else a + x) + update
