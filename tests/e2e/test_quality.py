"""What quantised weights cost, told by a running server: a record's figures where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from penstock.core.protocol.model_folder import demo_folder
from penstock.plugins.commands.quant.command import quant, quantize


def test_a_quantised_model_tells_its_record(starter: Any, tmp_path: Path) -> None:
    brook, out = str(demo_folder()), str(tmp_path / "brook-int4")
    written = CliRunner().invoke(quantize, [brook, "--scheme", "w4a16", "--lm-head", "w8a16", "--out", out])
    assert written.exit_code == 0, written.output
    assert CliRunner().invoke(quant, ["report", out, "--against", brook, "--max-texts", "2"]).exit_code == 0
    record = json.loads((Path(out) / "quality.json").read_text())
    server = starter("--model", out, "--served-model-name", "brook")
    (pool,) = server.client.get("/server_info").json()["pools"]
    told = pool["engine"]["quality"]
    assert told == {
        "scheme": record["scheme"], "status": "measured", "kl_mean": record["kl_mean"], "top1": record["top1"], "record": record["record_sha256"],
    }  # fmt: skip
    assert server.metric("penstock_quality_kl_mean_nats", 'engine="0"') == record["kl_mean"]
    assert server.metric("penstock_quality_top1_ratio", 'engine="0"') == record["top1"]
    assert server.metric("penstock_quality_info", f'record="{record["record_sha256"]}"') == 1.0
    ask = {"model": "brook", "messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0, "max_tokens": 24}
    answer = server.client.post("/v1/chat/completions", json=ask).json()
    assert "42" in answer["choices"][0]["message"]["content"]
    assert server.stop() == 0
