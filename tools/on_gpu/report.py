"What was measured, as JSON and as Markdown."
import json
import re
from pathlib import Path

COLUMNS = ("what", "precision", "batch", "images/s", "against the reference", "MFU", "peak memory, GiB", "waits a step")
REFERENCES = ("reference, cached latents", "DiTPipeline of diffusers")


def slug(name: str) -> str: return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def against(rows: list[dict]) -> list[dict]:
    "The rows, each with its images a second over those of the reference of the same task and model."
    base = {(r["task"], r["model"]): r["images_per_second"] for r in rows if r["what"] in REFERENCES}
    return [{**r, "against": (r["images_per_second"] / base[r["task"], r["model"]]
                              if (r["task"], r["model"]) in base else None)} for r in rows]


def shown(value, form: str) -> str: return "–" if value is None else format(value, form)


def tables(report: dict) -> str:
    "The rows in Markdown, a table for each task and model."
    text, last = [], None
    for r in report["rows"]:
        title = f"{r['task']}, {r['model']}"
        if title != last:
            text += ["", f"**{title}**", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        last = title
        text.append(f"| {r['what']} | {r['precision']} | {r['batch']} | {r['images_per_second']:.1f} | "
                    f"{shown(r['against'], '.2f')} | {shown(r['mfu'], '.0%')} | {shown(r['peak_gib'], '.1f')} | "
                    f"{shown(r['waits'], '.1f')} |")
    return "\n".join(text).strip()


def markdown(report: dict) -> str:
    d, checks = report["device"], report["checks"]
    ok = sum(c["status"] == "ok" for c in checks)
    peak = "no MFU, since its peak is not known"
    if d.get("peak_bf16_tflops"): peak = f"MFU against {d['peak_bf16_tflops']:.0f} TFLOPS of dense bfloat16"
    lines = [f"### {d['name']}", "",
             f"torch {report['versions']['torch']}, dmp_wb {report['versions']['dmp_wb']}, {report['date']}; "
             f"{report['seconds']:.0f} s of a budget of {report['budget']:.0f}; {peak}. Latents 4 × 32 × 32 at random, "
             "random weights. A step's FLOPs are those it needs: two forward passes with a frozen backbone, else "
             "three.", "",
             f"Correct on the device: {ok} of {len(checks)} checks.", ""]
    lines += [f"- {c['name']}: {c['status']}" + (f", {c['why']}" if c.get("why") else "") for c in checks]
    lines += ["", tables(report), ""]
    left = [s for s in report["speeds"] if s["status"] != "ok"]
    lines += [f"- {s['name']}: {s['status']}, {s['why']}" for s in left]
    return "\n".join(lines).strip() + "\n"


def write(report: dict, folder: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{slug(report['device']['name'])}"
    files = folder / f"{name}.json", folder / f"{name}.md"
    files[0].write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    files[1].write_text(markdown(report), encoding="utf-8")
    return files
