"""The rule names the point that its words say, whatever the order of the points and whichever way is better."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen.errors import InputError
from fastgen.sweep.choice import Candidate, Rule, choose, parse_within

ACCURACY = [Candidate(0.70, 0.02, 5), Candidate(0.79, 0.02, 10), Candidate(0.795, 0.02, 20), Candidate(0.80, 0.02, 40)]
FID = [Candidate(50.0, 1.5, 5), Candidate(41.2, 1.5, 10), Candidate(40.5, 1.5, 20), Candidate(40.0, 1.5, 40)]


@pytest.mark.parametrize(
    ("rule", "accuracy", "fid"),
    [
        (Rule("best"), 3, 3),
        (Rule("fewest", 0, "%"), 3, 3),
        (Rule("fewest", 1, "%"), 2, 3),
        (Rule("fewest", 2, "%"), 1, 2),
        (Rule("fewest", 1, "se"), 1, 1),
        (Rule("fewest", 5, "se"), 0, 1),
        (Rule("fewest", 25, "%"), 0, 0),
    ],
)
def test_the_fewest_evaluations_that_are_good_enough(rule, accuracy, fid):
    assert choose(ACCURACY, rule, "higher").chosen == accuracy
    assert choose(FID, rule, "lower").chosen == fid


def test_of_equal_evaluations_the_better_score_wins():
    points = [Candidate(0.79, 0.0, 10), Candidate(0.795, 0.0, 10), Candidate(0.80, 0.0, 20)]
    assert choose(points, Rule(), "higher").chosen == 1


def test_of_equal_best_scores_the_one_with_fewer_evaluations_wins():
    points = [Candidate(0.8, 0.0, 20), Candidate(0.8, 0.0, 10), Candidate(0.8, 0.0, 10)]
    for rule in (Rule("best"), Rule()):
        assert choose(points, rule, "higher").chosen == 1


def test_points_without_a_score_are_not_named():
    points = [Candidate(math.nan, math.nan, 1), Candidate(0.5, 0.1, 9)]
    assert choose(points, Rule(), "higher").chosen == 1
    assert choose(points[:1], Rule(), "higher") is None


def test_an_undefined_standard_error_lets_only_the_best_pass_and_says_so():
    points = [Candidate(0.79, 0.02, 5), Candidate(0.8, math.nan, 10)]
    found = choose(points, Rule("fewest", 1, "se"), "higher")
    assert (found.chosen, found.undefined_error) == (1, True)
    assert not choose(points, Rule(), "higher").undefined_error


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        st.integers(-20, 20).map(lambda n: n / 8) | st.just(math.nan),
        st.sampled_from([0.0, 0.125, 0.5]),
        st.integers(1, 6),
    ),
    min_size=1,
    max_size=8,
)
RULES = st.builds(
    Rule, st.sampled_from(["best", "fewest"]), st.sampled_from([0, 1, 25, 100]), st.sampled_from(["%", "se"])
)


@given(CANDIDATES, RULES, st.sampled_from(["higher", "lower"]))
def test_nothing_beats_the_point_that_is_named_by_the_rules_own_words(points, rule, better):
    found = choose(points, rule, better)
    scored = [p for p in points if not math.isnan(p.value)]
    if not scored:
        assert found is None
        return

    def loss(p):
        return -p.value if better == "higher" else p.value

    best, named = min(map(loss, scored)), points[found.chosen]
    assert loss(points[found.best]) == best
    if rule.kind == "best":
        assert named == points[found.best]
        return
    error = points[found.best].standard_error
    allowed = abs(best) * rule.amount / 100 if rule.unit == "%" else rule.amount * error
    good = [p for p in scored if loss(p) <= best + allowed]
    assert named in good
    assert found.within == len(good)
    assert min((p.evaluations, loss(p)) for p in good) == (named.evaluations, loss(named))


@given(CANDIDATES, RULES, st.sampled_from(["higher", "lower"]), st.randoms())
def test_the_order_of_the_points_does_not_change_what_is_named(points, rule, better, random):
    shuffled = list(points)
    random.shuffle(shuffled)
    errors = {p.standard_error for p in points}
    a, b = choose(points, rule, better), choose(shuffled, rule, better)
    if a is not None and (rule.unit == "%" or len(errors) == 1):
        assert points[a.chosen][::2] == shuffled[b.chosen][::2]


@pytest.mark.parametrize(("text", "expected"), [("2%", (2, "%")), ("1se", (1, "se")), (" 0.5 % ", (0.5, "%"))])
def test_within_is_a_percentage_or_standard_errors(text, expected):
    assert parse_within(text) == expected


@pytest.mark.parametrize("text", ["2", "-1%", "se", "nan%", "1 s", ""])
def test_any_other_within_is_refused(text):
    with pytest.raises(InputError, match="--within: found "):
        parse_within(text)


def test_another_rule_is_refused_with_the_choices():
    with pytest.raises(InputError, match="did you mean 'fewest'"):
        Rule("fewer")


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (Rule("fewest", 0, "se", "slow"), 2),  # as good as the slow one: the best is never asked
        (Rule("fewest", 2, "se", "slow"), 1),
        (Rule("fewest", 20, "se", "slow"), 0),
        (Rule("fewest", 2, "%", "slow"), 1),
    ],
)
def test_against_a_reference_its_value_and_its_standard_error_decide(rule, named):
    points = [
        Candidate(0.70, 0.30, 5),  # a noisy point is not let through for its own noise
        Candidate(0.78, 0.00, 10),
        Candidate(0.80, 0.00, 20),
        Candidate(0.95, 0.00, 40),  # better than the reference, which changes nothing
        Candidate(0.79, 0.005, 1000),
    ]
    found = choose(points, rule, "higher", against=4)
    assert (found.chosen, found.best, found.against) == (named, 3, 4)
    mirrored = [Candidate(-p.value, p.standard_error, p.evaluations) for p in points]
    if rule.unit == "se":
        assert choose(mirrored, rule, "lower", against=4).chosen == named


def test_the_reference_itself_is_named_where_nothing_cheaper_is_as_good():
    points = [Candidate(0.5, 0.0, 5), Candidate(0.8, 0.01, 1000)]
    assert choose(points, Rule("fewest", 2, "se", "slow"), "higher", against=1).chosen == 1


def test_a_reference_without_a_score_names_nothing():
    points = [Candidate(0.5, 0.0, 5), Candidate(math.nan, math.nan, 1000)]
    assert choose(points, Rule("fewest", 2, "se", "slow"), "higher", against=1) is None


@given(CANDIDATES, RULES, st.sampled_from(["higher", "lower"]), st.data())
def test_against_the_best_point_is_the_rule_without_a_reference(points, rule, better, data):
    plain = choose(points, rule, better)
    if plain is not None and rule.kind == "fewest":
        assert choose(points, rule, better, against=plain.best) == plain


def test_the_best_value_is_held_against_no_point():
    with pytest.raises(InputError, match="leave --against ddpm-1000steps-g2 out"):
        Rule("best", against="ddpm-1000steps-g2")
