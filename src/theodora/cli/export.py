"""`theodora export`: an adapter in the form that another program reads.

example:
  theodora export runs/first --to hf --output merged --dtype bf16
  theodora export runs/first --to peft --output first-peft

  hf      a plain model folder with the adapter merged in (as `theodora merge`)
  peft    PEFT's adapter folder

Every export ends with `theodora verify`: it gets its name only if it predicts what the adapter on its base does.
"""

from __future__ import annotations

import argparse
import json

from theodora.cli.verify import add_probe_arguments, read_text, show

_FORMS = ("hf", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora export`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter (PEFT's files)")
    parser.add_argument("--to", required=True, choices=_FORMS, metavar="|".join(_FORMS), help="the form, see below")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder to write")
    parser.add_argument("--base-model", metavar="MODEL", help="base model. Default: the one that the adapter names")
    parser.add_argument("--dtype", metavar="fp32|bf16|fp16", help="of the exported weights. Default: as in the base")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at --output")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the export with the adapter")
    add_probe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")


def run(args: argparse.Namespace) -> int:
    """Write, compare and report."""
    from theodora.cli.console import stderr, stdout
    from theodora.export import VerificationFailed, export_adapter

    with stderr().status("Exporting ...") as status:
        try:
            report = export_adapter(
                args.adapter,
                args.output,
                args.to,
                base_model=args.base_model,
                dtype=args.dtype,
                overwrite=args.overwrite,
                check=not args.no_verify,
                text=read_text(args.text),
                tokens=args.tokens,
                bound=args.bound,
                kl_bound=args.kl_bound,
                trust_remote_code=args.trust_remote_code,
                progress=status.update,
            )
        except VerificationFailed as failure:
            status.stop()
            show(failure.verification, stderr())
            raise
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    if report.verification is not None:
        show(report.verification, stdout())
    for note in report.notes:
        stdout().print("Note: " + note, markup=False, style="yellow", soft_wrap=True)
    stdout().print(f"{report.output}  ({report.bytes / 1e6:,.1f} MB)", markup=False, soft_wrap=True)
    return 0
