def test_first(run, tmp_path):
    records = run()
    for r in records.values():
        print(r.key, r.status, r.message[:300], r.score, r.general_loss, r.seconds)
    assert all(r.status == "ok" for r in records.values())
    assert 0
