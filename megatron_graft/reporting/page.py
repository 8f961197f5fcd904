"""``report.md``: the figures of ``report.json`` as one readable page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron_graft.log import format_seconds
from megatron_graft.reporting.figures import texts_of

PLOT_FILE = "loss.png"
NOTHING = "–"
_MODEL = (
    ("{} layers", "num_layers"), ("hidden {}", "hidden_size"), ("FFN {}", "ffn_hidden_size"),
    ("{} heads", "num_attention_heads"), ("{} experts", "num_experts"), ("top-{}", "moe_router_topk"),
)  # fmt: skip
_TRAINING = (
    ("{} steps", "steps"), ("batch {}", "global_batch_size"), ("sequence {}", "seq_length"),
    ("learning rate {}", "lr"), ("seed {}", "seed"), ("{}", "precision"),
)  # fmt: skip
_LAYOUT = (
    ("{} processes", "world_size"), ("TP {}", "tensor_model_parallel_size"), ("PP {}", "pipeline_model_parallel_size"),
    ("EP {}", "expert_model_parallel_size"), ("{} layers", "transformer_impl"), ("{}", "distributed_backend"),
)  # fmt: skip


def page_of(report: dict[str, Any]) -> str:
    """The page of a report, Markdown."""
    parts = [
        f"# Run `{report['name']}`",
        _verdict(report),
        f"![Training loss, and held-out loss by length of match]({PLOT_FILE})",
        _texts(report),
        _by_order(report),
        _comparison(report),
        "## The run",
        _facts(report),
        "## Wall time",
        _seconds(report),
        "## Made by",
        f"```\n{report['command']}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdict(report: dict[str, Any]) -> str:
    machine, text = report["machine"], report["held_out"]
    first = f"Held-out loss **{_number(text['loss'])}** ({_number(text['bits_per_byte'])} bits per byte)"
    if text["bigram"]:
        side = "below" if text["beats_bigram"] else "NOT below"
        first += f", {side} the {_number(text['bigram']['loss'])} of a bigram model counted over the same tokens"
    sentences = [f"{first}."]
    sentences.append(
        "Losses are in nats per token, means over every token of a text that the run was not trained on, read in "
        f"windows of {report['config']['seq_length']} tokens by one process; bits per byte are over the bytes that "
        "these tokens spell."
    )
    if _has_memory(report):
        sentences.append("“Memory off” are the same weights with the memory sites bypassed.")
    sentences.append(
        f"Reported on {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"megatron-core {machine['megatron-core']}."
    )
    return " ".join(sentences)


def _texts(report: dict[str, Any]) -> str:
    heads, rows = ["text", "tokens", "loss", "bits/byte", "loss, bigram"], []
    if _has_memory(report):
        heads.append("loss, memory off")
    if report["bank"]:
        heads.append("hit rate")
    for key, text in texts_of(report).items():
        row = [key.replace("_", "-"), _count(text["tokens"]), _number(text["loss"]), _number(text["bits_per_byte"])]
        row.append(_number((text["bigram"] or {}).get("loss")))
        if _has_memory(report):
            row.append(_number((text["memory_off"] or {}).get("loss")))
        if report["bank"]:
            row.append(_percent(report["hit_rate"][key]["any"]))
        rows.append(row)
    return markdown_table(heads, rows)


def _by_order(report: dict[str, Any]) -> str:
    text = report["held_out"]
    if not text["by_order"]:
        return ""
    others = {
        name: other["held_out"]["by_order"]
        for name, other in report.get("comparison", {}).items()
        if other["held_out"]["by_order"]
    }
    rows = [
        [
            f"{order} tokens" if order.isdigit() else order, _percent(part["share"]), _number(part["loss"]),
            _number(part["loss_memory_off"]),
            *(_number(orders.get(order, {}).get("loss")) for orders in others.values()),
        ]
        for order, part in text["by_order"].items()
    ]  # fmt: skip
    heads = ["longest match", "share of held-out", "loss", "loss, memory off", *(f"loss, {name}" for name in others)]
    return markdown_table(heads, rows)


def _comparison(report: dict[str, Any]) -> str:
    compared = report.get("comparison")
    if not compared:
        return ""
    own = {"arm": report["arm"], "held_out": report["held_out"]}
    own |= {"tokens_per_second": report["speed"] and report["speed"]["tokens_per_second"]}
    rows = [
        [
            name, arm["arm"], _number(arm["held_out"]["loss"]), _number(arm["held_out"]["bits_per_byte"]),
            _number(arm["held_out"].get("difference"), "+.4f"), _number(arm["tokens_per_second"], ",.0f"),
        ]
        for name, arm in {report["name"]: own, **compared}.items()
    ]  # fmt: skip
    heads = ["run", "memory", "held-out loss", "bits/byte", "difference", "tokens/s"]
    return "## Beside other runs of the same steps, seed, batch and data\n\n" + markdown_table(heads, rows)


def _facts(report: dict[str, Any]) -> str:
    config, tokens, loss = report["config"], report["tokens"], report["training_loss"]
    seen = f"{_count(tokens['seen'])} of {_count(tokens['available'])} ({_number(tokens['passes'], '.2f')} passes)"
    mean_name = next(name for name in loss if name.startswith("mean_last"))
    rows = [
        ["model", f"{_listed(config, _MODEL)}; {_count(report['parameters']['total'])} parameters, "
                  f"{_count(report['parameters']['memory_sites'])} of them in memory sites"],
        ["training", _listed(config, _TRAINING)],
        ["layout", _listed(config, _LAYOUT)],
        ["tokens seen", seen],
        ["training loss", f"{_number(loss['first'])} at first, {_number(loss['last'])} at last, "
                          f"{_number(loss[mean_name])} over the {mean_name.replace('_', ' ').removeprefix('mean ')}"],
        ["tokenizer", f"{report['tokenizer']['type']}, {_count(report['tokenizer']['vocab_size'])} ids, "
                      f"`{_short(report['tokenizer']['fingerprint'])}`"],
    ]  # fmt: skip
    if report["speed"]:
        rows.append(["speed", f"{_number(report['speed']['tokens_per_second'], ',.0f')} tokens/s"])
    if report["bank"]:
        rows += _bank_facts(report)
    if report["engram"]:
        rows.append(["hashed tables", _engram_fact(report["engram"])])
    if _has_memory(report):
        rows += [["memory sites", _site_facts(report)], ["waiting for memory", _waiting(report["speed"])]]
    return markdown_table(["", ""], rows, numbers=False)


def _has_memory(report: dict[str, Any]) -> bool:
    return bool(report["bank"] or report["engram"])


def _bank_facts(report: dict[str, Any]) -> list[list[str]]:
    bank, rates = report["bank"], report["hit_rate"]["training"] or {}
    control = f", control: {bank['control']['kind']} rows (seed {bank['control']['seed']})" if bank["control"] else ""
    orders = ", ".join(f"{order}: {_percent(rate)}" for order, rate in rates.items() if order != "any")
    layers = ", ".join(map(str, bank["donor"]["layers"]))
    further = "".join(f", and bank `{_short(digest)}`" for digest in report["further_banks"])
    return [
        ["bank", f"{_count(bank['num_rows'])} rows × {bank['row_dim']}{control}, `{_short(bank['digest'])}`{further}"],
        ["donor", f"{bank['donor']['name']}, layer {layers}, weights `{_short(bank['donor']['revision'])}`"],
        ["hit rate in training", _percent(rates.get("any")) + (f" ({orders})" if orders else "")],
    ]


def _engram_fact(engram: dict[str, Any]) -> str:
    layers = ", ".join(str(layer) for layer, _ in engram["layer_ids"])
    sizes = ", ".join(map(_count, engram["vocab_sizes"]))
    documents = "across" if engram["across_documents"] else "within"
    return (
        f"{engram['dialect']}, layers {layers}, orders 2 to {engram['max_order']}, {engram['heads']} heads of {sizes} "
        f"rows or more, {engram['dim']} elements an order, {documents} documents"
    )


def _site_facts(report: dict[str, Any]) -> str:
    return "; ".join(_site_fact(layer, site) for layer, site in (report["sites"] or {}).items()) or NOTHING


def _site_fact(layer: str, site: dict[str, Any]) -> str:
    gate = f"gate {_number(site['gate_mean'], '.3f')}"
    most = f"{_number(site['gate_p10'], '.2f')} to {_number(site['gate_p90'], '.2f')}"
    delta = f"|δ|/|h| {_number(site['delta_ratio'], '.3f')}"
    return (
        f"layer {layer}: {gate} (10 % to 90 %: {most}), {delta}, participation {_number(site['participation'], '.1f')}"
    )


def _waiting(speed: dict[str, Any] | None) -> str:
    if speed is None:
        return NOTHING
    stall, fetch = speed["stall_ms"], speed["fetch_ms"]
    waited = f"{_number(stall['median'], '.2f')} ms per step (at most {_number(stall['max'], '.2f')})"
    return f"{waited}, for {_number(fetch['median'], '.2f')} ms of fetching beside the step"


def _seconds(report: dict[str, Any]) -> str:
    seconds = {name: value for name, value in report["seconds"].items() if value is not None}
    return markdown_table(list(seconds), [[format_seconds(value) for value in seconds.values()]])


def _listed(values: dict[str, Any], wanted: Iterable[tuple[str, str]]) -> str:
    return ", ".join(form.format(values[name]) for form, name in wanted if name in values)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table; all columns but the first are numbers, right-aligned, unless told otherwise."""
    lines = [list(heads), ["---", *(["---:" if numbers else "---"] * (len(heads) - 1))], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None, form: str = ".4f") -> str:
    return NOTHING if value is None else format(value, form)


def _count(value: int | None) -> str:
    return _number(value, ",d")


def _percent(value: float | None) -> str:
    return _number(value, ".1%")


def _short(digest: str | None) -> str:
    return NOTHING if digest is None else digest[:12]
