import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.serving.policy import AGEING, Backlog, Curve, Work, choose

ROW_S = 0.01


def image(id, rows, arrival=0.0, key="", deadline=None):
    return Work(id, key, arrival, deadline, rows, 0, ROW_S, 2 * ROW_S)


images = st.lists(
    st.builds(
        lambda rows, arrival, key, patience: (rows, arrival, key, patience and arrival + patience),
        st.integers(1, 60),
        st.floats(0, 20),
        st.sampled_from("abc"),
        st.none() | st.floats(0.01, 30),
    ),
    max_size=30,
).map(lambda given: [image(i, *fields) for i, fields in enumerate(given)])
nows = st.floats(20, 80)


def served(works, room, arrivals=lambda now: [], now=0.0, limit=100_000, **order):
    """Run until nothing is left: id -> when it ended. Every step takes ROW_S."""
    works, ended = list(works), {}
    while works and limit:
        works += arrivals(now)
        for work in choose(works, room, now, **order):
            work.ran(guided=False)
            if not work.rows_left:
                works.remove(work)
                ended[work.id] = now + ROW_S
        now, limit = now + ROW_S, limit - 1
    assert limit, f"{len(works)} images are left"
    return ended


class TestCurve:
    def test_a_step_is_padded_up_to_the_next_size_or_interpolated_where_the_engine_runs_any(self):
        points = {1: 1.0, 4: 2.5, 2: 1.5}
        assert Curve(points).seconds(3) == 2.5
        assert Curve(points, any_size=True).seconds(3) == pytest.approx(2.0)

    def test_more_images_than_the_largest_size_run_as_several_steps(self):
        assert Curve({1: 1.0, 2: 1.5}).seconds(5) == 2 * 1.5 + 1.0
        assert Curve({4: 1.0}).seconds(0) == 0

    @pytest.mark.parametrize(
        ("fixed_ms", "image_ms", "knee"), [(3.8, 5.3, 4), (0.0, 23.0, 1), (2.9, 2.8, 6), (40.0, 0.1, 16)]
    )
    def test_the_knee_is_the_smallest_size_within_a_twentieth_of_the_best(self, fixed_ms, image_ms, knee):
        sizes = (1, 2, 3, 4, 6, 8, 12, 16)
        assert Curve({n: fixed_ms + image_ms * n for n in sizes}).knee() == knee

    def test_an_image_in_company_takes_at_most_three_and_a_half_times_as_long_as_alone(self):
        curve = Curve({n: 1.0 + 0.55 * (n - 1) for n in (1, 2, 4, 8, 16, 32)})
        assert curve.knee() == 4
        assert curve.seconds(8) > 3.5 * curve.seconds(1) > curve.seconds(4)

    def test_a_curve_without_a_measurement_is_refused(self):
        for points in ({}, {0: 1.0}):
            with pytest.raises(ValueError, match="1 image or more"):
                Curve(points)


class TestChoose:
    @given(images, st.integers(1, 12), nows)
    def test_it_takes_as_many_as_there_is_room_for_and_none_twice(self, works, room, now):
        chosen = choose(works, room, now)
        assert len(chosen) == min(room, len(works))
        assert len({work.id for work in chosen}) == len(chosen)

    @given(images, st.integers(1, 12), nows, st.randoms())
    def test_the_order_in_which_they_are_given_does_not_matter(self, works, room, now, random):
        shuffled = random.sample(works, len(works))
        assert [w.id for w in choose(works, room, now)] == [w.id for w in choose(shuffled, room, now)]

    @given(images, st.integers(1, 8))
    @settings(deadline=None)
    def test_without_lateness_an_image_that_runs_goes_on_until_it_ends_unless_something_arrives(self, works, room):
        works = [work for work in works if work.deadline is None]
        running = set()
        while works:
            chosen = {work.id for work in choose(works, room, now=20.0, max_wait_s=math.inf)}
            assert running <= chosen
            for work in [work for work in works if work.id in chosen]:
                work.ran(guided=False)
            running = {work.id for work in works if work.id in chosen and work.rows_left}
            works = [work for work in works if work.rows_left]

    @given(images, st.integers(1, 12), nows)
    def test_every_client_that_waits_has_an_image_in_a_step_with_room_for_all(self, works, room, now):
        keys = {work.key for work in works}
        if room >= 2 * len(keys):
            assert {work.key for work in choose(works, room, now)} == keys

    def test_short_ones_run_first_and_older_ones_are_not_overtaken_for_ever(self):
        old, short = image(1, 50, arrival=0.0), image(2, 10, arrival=1.0)
        assert choose([old, short], 1, now=1.0) == [short]
        gain_s = (50 - 10) * ROW_S
        late = image(3, 10, arrival=1.01 * gain_s / AGEING)
        assert choose([old, late], 1, now=late.arrival) == [old]

    def test_an_image_that_must_run_now_to_meet_its_deadline_goes_before_shorter_ones(self):
        pressed, short = image(1, 50, deadline=1.0), image(2, 10)
        assert choose([pressed, short], 1, now=0.0) == [pressed]
        assert choose([image(1, 50, deadline=9.0), short], 1, now=0.0) == [short]

    def test_the_earliest_deadline_goes_first(self):
        works = [image(i, 10, deadline=1.0 - 0.1 * i) for i in range(5)]
        assert [work.id for work in choose(works, 2, now=0.5)] == [4, 3]

    def test_late_images_of_one_client_leave_another_half_of_the_room(self):
        late = [image(i, 10, key="a") for i in range(8)]
        other = [image(10 + i, 10, key="b", arrival=40.0) for i in range(8)]
        keys = [work.key for work in choose(late + other, 4, now=40.0)]
        assert sorted(keys) == ["a", "a", "a", "b"]

    @pytest.mark.parametrize("room", [1, 3])
    def test_a_long_image_ends_though_short_ones_come_without_end(self, room):
        ids = iter(range(10, 10_000_000))

        def short_ones(now):  # twice as many as can be served
            return [image(next(ids), 10, now) for _ in range(room)] if round(now / ROW_S) % 5 == 0 and now < 15 else []

        order = {"ageing": 0.0, "max_wait_s": 5.0}
        assert served([image(1, 50)], room, short_ones, **order)[1] < 5.0 + 50 * ROW_S
        overtaken_s = (50 - 10) * ROW_S / AGEING  # by what comes in this time, twice as much as can be served
        assert served([image(1, 50)], room, short_ones)[1] < 2 * overtaken_s + 2 * 50 * ROW_S

    @given(images, st.integers(1, 8))
    @settings(deadline=None)
    def test_every_image_ends_and_takes_as_many_steps_as_it_has_rows(self, works, room):
        rows = sum(work.rows_left for work in works)
        longest = max((work.rows_left for work in works), default=0)
        ended = served(works, room, now=20.0)
        steps = round((max(ended.values(), default=20.0) - 20.0) / ROW_S)
        assert max(rows / room, longest) <= steps <= rows / room + longest  # never a free place while work waits

    def test_a_flood_of_one_client_does_not_slow_another_one(self):
        flood = [image(i, 50, key="flood") for i in range(500)]
        other = [image(1000 + i, 10, arrival=float(i), key="other") for i in range(50)]
        waiting = list(other)

        def due(now):
            here = [work for work in waiting if work.arrival <= now]
            waiting[:] = waiting[len(here) :]
            return here

        ended = served(flood, 4, due)
        assert max(ended[work.id] - work.arrival for work in other) < 2 * 10 * ROW_S

    def test_a_thousand_images_take_less_than_a_step(self):
        works = [Work(i, f"k{i % 7}", i / 10, None, 1 + i % 50, i % 2, 0.01, 0.02) for i in range(1000)]
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            choose(works, 8, now=110.0)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.003  # below 1 ms where nothing else runs


work_done = st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0.001, 100)), max_size=30)


class TestBacklog:
    def filled(self, works):
        backlog = Backlog()
        for i, (key, seconds) in enumerate(works):
            backlog.add(i, key, seconds)
        return backlog

    @given(work_done, st.sampled_from("abcde"), st.floats(0.001, 100))
    def test_a_prediction_is_between_the_own_work_and_all_the_work(self, works, key, seconds):
        predicted = self.filled(works).predicted(key, seconds)
        own = seconds + sum(s for k, s in works if k == key)
        assert own <= predicted + 1e-6
        assert predicted <= seconds + sum(s for _, s in works) + 1e-6

    @given(work_done, st.sampled_from("abcde"), st.floats(0.001, 100))
    def test_a_prediction_is_the_end_of_the_work_where_clients_share_evenly(self, works, key, seconds):
        left = {k: sum(s for other, s in works if other == k) for k, _ in works}
        left[key] = left.get(key, 0.0) + seconds
        now = 0.0
        while left.get(key):  # everybody advances until the next one is done
            least = min(left.values())
            now += least * len(left)
            left = {k: s - least for k, s in left.items() if s > least}
        assert self.filled(works).predicted(key, seconds) == pytest.approx(now, rel=1e-6)

    @given(work_done, st.data())
    def test_progress_and_removal_leave_what_was_never_added(self, works, data):
        backlog = self.filled(works)
        for i in data.draw(st.permutations(range(len(works)))):
            if data.draw(st.booleans()):
                assert backlog.progress(i, works[i][1] / 2) == pytest.approx(works[i][1] / 2)
            backlog.remove(i)
        assert len(backlog) == 0
        assert [backlog.predicted(k, 1.0) for k in "abcd"] == [1.0] * 4
        assert backlog.ahead("a") == 0

    def test_a_new_client_waits_for_as_much_of_a_flood_as_it_brings_itself(self):
        backlog = self.filled([("flood", 10.0)] * 9)
        assert backlog.predicted("other", 2.0) == 4.0
        assert backlog.ahead("other") == 1
        assert backlog.predicted("flood", 2.0) == 92.0
        assert backlog.ahead("flood") == 9

    def test_a_client_under_many_names_waits_like_under_one(self):
        backlog = self.filled([(f"name {i}", 1.0) for i in range(100)])
        assert backlog.predicted("another name", 1.0) == 101.0

    def test_who_would_wait_too_long_is_told_when_to_come_back(self):
        backlog = self.filled([("a", 34.5)])
        assert backlog.retry_after("a", 1.0, max_wait_s=30.0) == 14  # of the wait, 0.3 are left for others that come
        assert backlog.retry_after("b", 1.0, max_wait_s=30.0) is None
        assert backlog.retry_after("b", 100.0, max_wait_s=50.0) is None  # its own work is not waiting
        assert backlog.retry_after("b", 1.0, deadline_s=1.5) == 1
        backlog.progress(0, 21.0)
        assert backlog.retry_after("a", 1.0, max_wait_s=30.0) is None

    def test_a_prediction_follows_how_long_the_work_takes_and_forgets_what_was(self):
        backlog = self.filled([("a", 10.0)])
        for _ in range(60):
            backlog.observe(done_s=0.5, took_s=1.0)
        assert backlog.predicted("a", 1.0) == pytest.approx(22.0, rel=0.02)
        assert backlog.retry_after("a", 1.0, max_wait_s=20.0) == 6
        for _ in range(60):
            backlog.observe(done_s=1.0, took_s=1.0)
        assert backlog.predicted("a", 1.0) == pytest.approx(11.0, rel=0.02)

    def test_a_server_that_stands_still_has_a_finite_prediction(self):
        backlog = self.filled([("a", 10.0)])
        backlog.observe(done_s=0.0, took_s=1e6)
        assert backlog.predicted("a", 0.0) == 1000.0

    def test_an_id_is_added_once_and_must_be_known(self):
        backlog = self.filled([("a", 1.0)])
        with pytest.raises(KeyError):
            backlog.add(0, "b", 1.0)
        for call in (lambda: backlog.progress(1, 1.0), lambda: backlog.remove(1)):
            with pytest.raises(KeyError):
                call()
        assert 0 in backlog
        assert 1 not in backlog
