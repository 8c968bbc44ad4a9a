"""What was chosen for the arms of a sweep, in plain text for its report."""

from collections.abc import Mapping, Sequence
from typing import Any

_WORDS = {"parameters": "parameters", "flops": "FLOPs", "state_size": "decode state"}


def choices(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One paragraph on learning rates that were searched and one on arms that were matched, if any were."""
    arms = [next(row for row in rows if row["arm"] == arm) for arm in dict.fromkeys(row["arm"] for row in rows)]
    return [text for text in (_rates(arms), _matches(arms)) if text]


def _rates(arms: Sequence[Mapping[str, Any]]) -> str:
    searched = [row for row in arms if row.get("searched_rates")]
    if not searched:
        return ""
    rates = sorted(rate for rate, _ in searched[0]["searched_rates"])
    parts, edge = [], []
    for row in searched:
        failed = [f"{rate:g}" for rate, score in row["searched_rates"] if score is None]
        parts.append(f"{row['arm']} {row['learning_rate']:g}" + (f" (failed: {', '.join(failed)})" if failed else ""))
        if len(rates) > 1 and row["learning_rate"] in (rates[0], rates[-1]):
            edge.append(row["arm"])
    seed = searched[0].get("search_seed")
    chosen_by = "its first seed, which is in its mean too" if seed is None else f"seed {seed}, which is in no mean"
    text = (
        f"Learning rates, each arm's best by validation {searched[0]['metric']} among "
        f"{', '.join(f'{rate:g}' for rate in rates)} with {chosen_by}: {', '.join(parts)}."
    )
    if edge:
        text += f" Warning: at the edge of what was tried for {', '.join(edge)}; a rate beyond may be better."
    return text


def _matches(arms: Sequence[Mapping[str, Any]]) -> str:
    matches = {row["arm"]: row["match"] for row in arms if row.get("match")}
    if not matches:
        return ""
    baseline = arms[0]["baseline"]
    set_to = [f"{arm} {match['knob']}={match['value']}" for arm, match in matches.items() if match["knob"]]
    left = [arm for arm, match in matches.items() if not match["knob"] and arm != baseline]
    text = f"Matched to {baseline} by {_WORDS[matches[baseline]['cost']]}: {', '.join(set_to)}."
    return text + (f" Left as they are: {', '.join(left)}." if left else "") + " Off: how far each still is."


def add_matching(table: list[list[str]], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The report's table, arms in its first column, with how far each is off what it was matched by, if it was."""
    matches = {row["arm"]: row["match"] for row in rows if row.get("match")}
    if not matches:
        return table
    baseline = rows[0]["baseline"]
    cells = ["" if arm == baseline else f"{100 * matches[arm]['off']:+.2f} %" for arm, *_ in table[1:]]
    return [[*line[:-1], cell, line[-1]] for line, cell in zip(table, ["off", *cells])]
