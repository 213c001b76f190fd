"""The command ``plugin``: compiles the plugin library for the TensorRT of this machine."""

from __future__ import annotations

from pathlib import Path

import click

from resvit_engines.console import Output, emit_json, output_options


@click.command(
    name="plugin",
    epilog="\b\nExamples:\n  resvit-engine plugin\n  resvit-engine plugin --out libresvit_plugins.so --json",
)
@click.option("--out", type=click.Path(path_type=Path), help="File to write.  [default: below ~/.cache/resvit]")
@click.option("--tensorrt-include", type=click.Path(path_type=Path), help="Folder of NvInfer.h.  [default: found]")
@click.option("--cuda-include", type=click.Path(path_type=Path), help="Folder of cuda.h.  [default: found]")
@click.option("--source", is_flag=True, help="Say where the source and its CMakeLists.txt are, and stop.")
@output_options
def plugin_command(
    out: Path | None,
    tensorrt_include: Path | None,
    cuda_include: Path | None,
    source: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile the library that brings our kernels into TensorRT 10.3 to 10.8 (JetPack 6).

    Newer versions need none: there the kernels lie inside the engine. 'resvit-engine build' compiles it by itself;
    here it is made in advance, or for use in a program of your own: load it into TensorRT's plugin registry before
    reading the engine. It needs g++ and the headers of TensorRT and CUDA, and is for one major version of TensorRT.
    """
    from resvit_engines.plugins.library import (
        cached_library,
        find_headers,
        library_from_source,
        record_of,
        source_files,
    )

    output = Output(quiet, as_json)
    if source:
        files = [str(file) for file in source_files()]
        if output.json:
            emit_json({"source": files})
        else:
            click.echo("\n".join(files))
        return
    headers = find_headers(tensorrt_include, cuda_include)
    library = cached_library(headers) if out is None else library_from_source(out, headers)
    if output.json:
        found = {**record_of(library), "path": str(library.resolve()), "tensorrt": headers.version}
        emit_json(found)
    elif output.quiet:
        click.echo(str(library))
    else:
        click.echo(f"plugin library for TensorRT {headers.version}: {library}")
