from herd.cluster.metrics import GatewayMetrics


def test_figures_are_labelled_by_engine_and_only_numbers_are_kept():
    metrics = GatewayMetrics()
    metrics.engines.update("a", {"running": 1, "name": "x", "ok": True})
    metrics.engines.update("b", {"running": 2.5, "waiting": 0})
    text = metrics.render().decode()
    assert 'herd_engine_running{engine="a"} 1.0' in text
    assert 'herd_engine_running{engine="b"} 2.5' in text
    assert text.count("# TYPE herd_engine_running gauge") == 1
    assert "herd_engine_name" not in text


def test_a_silent_engine_disappears():
    now = 0.0
    metrics = GatewayMetrics(stats_ttl_s=10, clock=lambda: now)
    metrics.engines.update("a", {"running": 1})
    now = 9.0
    metrics.engines.update("b", {"running": 1})
    assert b'engine="a"' in metrics.render()
    now = 11.0
    assert b'engine="a"' not in metrics.render()
    assert b'engine="b"' in metrics.render()
    metrics.engines.forget("b")
    assert b"herd_engine_running" not in metrics.render()


def test_registries_are_apart():
    one, other = GatewayMetrics(), GatewayMetrics()
    one.requests.labels("/x", "200").inc()
    assert b'endpoint="/x"' not in other.render()


def test_tokens_per_second_come_from_reports_far_enough_apart():
    now = 0.0
    stats = GatewayMetrics(stats_ttl_s=10, clock=lambda: now).engines

    def rate_after(at: float, tokens: int) -> object:
        nonlocal now
        now = at
        stats.update("a", {"generated_tokens": tokens})
        (latest,) = stats.latest()
        assert latest["generated_tokens"] == tokens
        return latest["tokens_per_s"]

    assert rate_after(1.0, 500) is None, "what came before it was heard of is not counted"
    assert rate_after(2.0, 520) == 20
    assert rate_after(2.01, 530) == 20, "two that came together"
    assert rate_after(4.0, 540) == 10
    now = 6.0
    assert stats.latest() == [{"engine_id": "a", "age_s": 2.0, "tokens_per_s": 10.0, "generated_tokens": 540.0}]
    now = 15.0
    assert stats.latest() == []
