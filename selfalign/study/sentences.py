"""What the statistics of a study say in words, whichever way they fall."""

import math
from collections.abc import Sequence
from typing import get_args

from selfalign.study.results import METRICS
from selfalign.study.statistics import (
    Analysis,
    Difference,
    EffectEstimate,
    QualityCost,
    SeedMean,
    Trend,
    Verdict,
    gain_interval,
    outcome,
)

_UP_TO_TWELVE = (
    *("no", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)


def number(value: float, digits: int = 3) -> str:
    """A number as people write it, with that many significant digits and a true minus sign."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
    else:
        mantissa = value / 10.0**exponent
        text = f"{mantissa:.{digits - 1}f}·10{str(exponent).translate(_SUPERSCRIPT)}"
    return text.replace("-", "−")


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, plus included."""
    return ("+" if value > 0 else "") + number(value, digits)


def count(amount: int, noun: str) -> str:
    """A small number in words, with its noun in the singular or the plural."""
    return f"{_word(amount)} {noun}" + ("" if amount == 1 else "s")


def _word(amount: int) -> str:
    return _UP_TO_TWELVE[amount] if amount < len(_UP_TO_TWELVE) else str(amount)


def percent(value: float, reference: float) -> str:
    """A value relative to another, in per cent; empty where that has no meaning."""
    return f"{number(abs(value / reference) * 100, 2)} %" if reference > 0 else ""


def mean_with_interval(mean: SeedMean) -> str:
    """Mean ± half of the interval, with as many decimals as the interval bears."""
    half = mean.half_width
    if half is None:
        return f"{number(mean.mean)} (1 seed)"
    if half < 1e-12 * abs(mean.mean) or half == 0:
        return f"{number(mean.mean)} ± 0"
    decimals = min(6, max(0, 1 - math.floor(math.log10(half))))
    return f"{mean.mean:,.{decimals}f} ± {half:,.{decimals}f}".replace("-", "−")


def _direction(value: float) -> str:
    return "lower" if value < 0 else "higher"


def _span(difference: SeedMean) -> str:
    """The interval in words, without signs that a reader has to turn round."""
    assert difference.interval is not None
    low, high = difference.interval
    if low * high >= 0:
        near, far = sorted((abs(low), abs(high)))
        return f"95 % interval {number(near)} to {number(far)} {_direction(low + high)}"
    return f"95 % interval from {number(-low)} lower to {number(high)} higher"


def _agreement(difference: SeedMean) -> str:
    seeds, agreeing = len(difference.values), difference.agreeing
    if agreeing == seeds:
        return "both seeds agree" if seeds == 2 else f"all {count(seeds, 'seed')} agree"
    return f"{_word(agreeing)} of {count(seeds, 'seed')} point{'s' * (agreeing == 1)} that way"


def _finding(metric: str, found: Difference) -> str:
    """Size, interval and agreement: what there is to say before judging."""
    difference = found.difference
    relative = percent(difference.mean, found.without)
    of = f", {relative} of {number(found.without, 4)}" if relative else ""
    text = (
        f"the {METRICS[metric].title} is {number(abs(difference.mean))} "
        f"{_direction(difference.mean)} on average{of}"
    )
    return f"{text} ({_span(difference)}; {_agreement(difference)})"


def effect_sentence(estimate: EffectEstimate) -> str:
    """Whether the effect helps one metric, by how much, and how sure that is."""
    found, metric = estimate.estimate, estimate.metric
    title = METRICS[metric].title
    if found is None:
        return f"Not known yet: no seed has all the runs that the {title} is compared in."
    difference = found.difference
    seeds = len(difference.values)
    if seeds == 1:
        relative = percent(difference.mean, found.without)
        of = f" ({relative})" if relative else ""
        return (
            f"Cannot be told from one seed, which has no interval: in it, the {title} is "
            f"{number(abs(difference.mean))} {_direction(difference.mean)}{of}."
        )
    if difference.mean == 0 and difference.half_width == 0:
        return f"Makes no difference: the {title} is the same in {count(seeds, 'seed')}."
    heads = {
        "helps": "Helps",
        "hurts": "Hurts",
        "cannot be told": f"Cannot be told from {count(seeds, 'seed')}",
    }
    return f"{heads[estimate.outcome]}: {_finding(metric, found)}."


def bound_sentence(estimate: EffectEstimate) -> str:
    """How large a gain and a loss the interval still allows, where it excludes neither."""
    found = estimate.estimate
    interval = gain_interval(estimate.metric, found.difference) if found else None
    if found is None or interval is None or estimate.outcome != "cannot be told":
        return ""
    low, high = interval

    def amount(value: float) -> str:
        relative = percent(value, found.without)
        return number(abs(value)) + (
            f" ({relative} of {number(found.without, 4)})" * bool(relative)
        )

    return (
        f"That is no proof of no effect: the interval still allows a gain of up to {amount(high)} "
        f"and a loss of up to {amount(low)}."
    )


def claim_sentence(estimate: EffectEstimate) -> str:
    """What becomes of the paper's claim on one metric; empty where it makes none."""
    verdict, expected = estimate.verdict, estimate.effect.expected
    if verdict is None:
        return ""
    claim = "that it helps" if expected == "gain" else "that it does not help"
    if verdict == "supported" and expected == "no gain":
        return f"The paper’s claim {claim} is supported here, and more: it hurts."
    ends = {
        "supported": "is supported here.",
        "contradicted": "is contradicted here.",
        "undecided": "is left undecided here.",
    }
    return f"The paper’s claim {claim} {ends[verdict]}"


def effect_paragraph(estimate: EffectEstimate) -> str:
    """All that is to be said of one effect on one metric."""
    parts = (effect_sentence(estimate), bound_sentence(estimate), claim_sentence(estimate))
    return " ".join(part for part in parts if part)


def _short(estimate: EffectEstimate) -> str:
    """One metric's part in the sentence that answers an effect's question."""
    title, found = METRICS[estimate.metric].title, estimate.estimate
    if found is None:
        return f"the {title} is not known yet"
    difference = found.difference
    if difference.interval is None:
        return f"one seed cannot tell for the {title} ({signed(difference.mean, 2)}, without an interval)"
    low, high = difference.interval
    size = f"{signed(difference.mean, 2)}, 95 % interval {signed(low, 2)} to {signed(high, 2)}"
    relative = percent(difference.mean, found.without)
    if estimate.outcome == "cannot be told":
        return f"for the {title} it cannot be told ({size})"
    verb = "improves" if estimate.outcome == "helps" else "worsens"
    return f"it {verb} the {title}" + (f" by {relative}" * bool(relative)) + f" ({size})"


def answer_sentence(estimates: Sequence[EffectEstimate]) -> str:
    """The answer to an effect's question in one sentence, over the headline metrics."""
    verdicts: dict[str, list[str]] = {}
    for estimate in estimates:
        if estimate.verdict:
            verdicts.setdefault(estimate.verdict, []).append(METRICS[estimate.metric].title)
    text = " and ".join(map(_short, estimates))
    text = text[:1].upper() + text[1:] + "."
    if verdicts:
        says = "it helps" if estimates[0].effect.expected == "gain" else "it does not help"
        found = (
            next(iter(verdicts))
            if len(verdicts) == 1
            else " and ".join(
                f"{v} on the {' and the '.join(titles)}" for v, titles in verdicts.items()
            )
        )
        text += f" The paper says that {says}: {found} here."
    return text


def summary_sentence(analysis: Analysis) -> str:
    """How the paper's claims fare on the headline metrics, counted."""
    parts, claims = [], 0
    for metric in analysis.headline:
        verdicts = [e.verdict for e in analysis.effects if e.metric == metric and e.verdict]
        claims = max(claims, len(verdicts))
        told = [
            f"{_word(amount)} {'is' if amount == 1 else 'are'} {verdict}"
            for verdict in get_args(Verdict)
            if (amount := verdicts.count(verdict))
        ]
        if told:
            listed = " and ".join(filter(None, [", ".join(told[:-1]), told[-1]]))
            parts.append(f"on the {METRICS[metric].title}, {listed}")
    if not parts:
        return ""
    found = "; ".join(parts)
    return f"The paper makes {count(claims, 'claim')}. {found[0].upper()}{found[1:]}."


def trend_sentence(trend: Trend) -> str:
    """Whether an effect is larger where there is less data."""
    title, change = METRICS[trend.metric].title, trend.change
    if change is None:
        return f"{title}: not known yet, as no seed has both ends of the sweep."
    small, large = (f"{100 * end(trend.by_fraction):g} %" for end in (min, max))
    where = f"with {small} of the training images than with {large}"
    if change.interval is None:
        return (
            f"{title}: cannot be told from one seed, which has no interval; in it, the effect differs "
            f"by {signed(change.mean)} {where.replace(' than with', ' from that with')}."
        )
    low, high = change.interval
    size = (
        f"the difference changes by {signed(change.mean)}, 95 % interval {signed(low)} to "
        f"{signed(high)}; {_agreement(change)}"
    )
    found = outcome(trend.metric, change)
    if found == "cannot be told":
        seeds = count(len(change.values), "seed")
        return f"{title}: whether it is worth more {where} cannot be told from {seeds} ({size})."
    return f"{title}: it is worth {'more' if found == 'helps' else 'less'} {where} ({size})."


def cost_sentence(cost: QualityCost, baseline: str) -> str:
    """What a variant needs to be as good as the baseline ends."""
    seeds = len(cost.steps)
    target = f"the {METRICS[cost.metric].title} at which {baseline} ends"
    if not cost.reached:
        return f"{cost.variant} does not reach {target} in {count(seeds, 'seed')}."
    share = SeedMean(cost.relative_flops).mean
    some = "" if cost.reached == seeds else f" in {_word(cost.reached)} of {count(seeds, 'seed')}"
    return f"{cost.variant} reaches {target} with {number(share, 2)} × its arithmetic{some}."


def caution_sentences(analysis: Analysis, seeds: int) -> list[str]:
    """What a reader has to know before believing an interval."""
    sentences = []
    if seeds > 1:
        sentences.append(
            "Intervals are 95 % t-intervals of the mean over seeds, of paired differences where two "
            "variants are compared: at one seed, all variants share initial weights, data order and "
            "noise. They tell how far this result would move with other seeds, and nothing about "
            "other data sets, models or budgets."
        )
    else:
        sentences.append(
            "There is one seed, hence no interval: any difference may be the luck of that seed."
        )
    if 1 < seeds < 5:
        sentences.append(
            f"From {count(seeds, 'seed')} the spread itself is barely known: an interval rests on "
            f"{count(seeds - 1, 'degree')} of freedom, takes the differences to be normally "
            "distributed, and is wide for that reason. What cannot be told may well be there."
        )
    if analysis.intervals:
        chance = analysis.intervals * 0.05
        sentences.append(
            f"This page shows {analysis.intervals} intervals of differences, and none is corrected for "
            f"their number: were there no effect at all, about {number(chance, 2)} of them would still "
            "exclude zero. Only the headline metrics were named beforehand."
        )
    return sentences
