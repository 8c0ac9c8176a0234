"""From MIL functions to a package on disk: our own passes, weights streamed, one blob per constant."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ane.convert.constants import Constants
from mlxkd.runtime import import_coremltools

# The program is emitted as the Neural Engine wants it, so little is left to do. Left out on purpose, among
# coremltools' hundred: guard_negative_gather_indices and add_int16_cast (they move the embedding to the CPU),
# and every pass that folds or copies constants, whose numbers are not in memory yet.
PASSES = (
    "common::dead_code_elimination",
    "common::noop_elimination",
    "mil_backend::adjust_io_to_supported_types",
    "mil_backend::sanitize_name_strings",
    "common::dedup_op_and_var_names",
)
DEFAULT_FUNCTION = "decode"


def save_package(
    path: Path,
    functions: dict[str, Any],
    constants: Constants,
    written: Callable[[int], None] | None = None,
) -> None:
    """Write a multi-function .mlpackage; the functions share every constant by its key.

    Args:
        path: the package to make; must not exist.
        functions: MIL functions by name; `DEFAULT_FUNCTION` or else the first is the default.
        constants: where the real arrays come from.
        written: called with the bytes of each constant written.
    """
    ct = import_coremltools()
    from coremltools.converters.mil.mil import Program

    program = Program()
    for name, function in functions.items():
        program.add_function(name, function)
    program.default_function_name = DEFAULT_FUNCTION if DEFAULT_FUNCTION in functions else next(iter(functions))
    program.export_as_multifunction = True
    _apply_passes(program)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".weights.") as folder:
        spec = _export(program, Path(folder), constants, written)
        # coremltools copies the weights folder into the package: hand it an empty one and move the file.
        empty = Path(folder) / "empty"
        empty.mkdir()
        ct.models.utils.save_spec(spec, str(path), weights_dir=str(empty))
        _move_weights(Path(folder), path)


def _move_weights(folder: Path, package: Path) -> None:
    blob = folder / "weight.bin"
    if blob.is_file():
        target = package / "Data" / "com.apple.CoreML" / "weights"
        target.mkdir(parents=True, exist_ok=True)
        shutil.move(blob, target / "weight.bin")


def _apply_passes(program: Any) -> None:
    import_coremltools()
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    for name in PASSES:  # one by one: coremltools' manager prints the whole program around each
        PASS_REGISTRY[name](program)
    program._check_early_error_out_for_invalid_program()


def _export(program: Any, folder: Path, constants: Constants, written: Callable[[int], None] | None) -> Any:
    """The Core ML specification; weight.bin is written into ``folder`` on the way."""
    from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter

    version = max(function.opset_version for function in program.functions.values())
    exporter = _streaming_exporter()(program, str(folder), version, constants, written)
    return CoreMLProtoExporter(
        program,
        exporter.export(),
        predicted_feature_name=None,
        predicted_probabilities_name=None,
        classifier_config=None,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=version,
    ).export(specification_version=version)


def _streaming_exporter() -> Any:
    """coremltools' exporter, asking for each constant's real array when it writes it.

    A function, because the base class exists only once coremltools is imported.
    """
    from coremltools.converters.mil.backend.mil.load import MILProtoExporter

    class StreamingExporter(MILProtoExporter):
        def __init__(
            self,
            program: Any,
            weights_dir: str,
            version: Any,
            constants: Constants,
            written: Callable[[int], None] | None,
        ):
            super().__init__(prog=program, weights_dir=weights_dir, specification_version=version)
            self._constants, self._written = constants, written or (lambda _: None)

        def create_file_value(self, var: Any) -> Any:
            key = var.op.weight_id
            real = None if key in self.weight_id_to_file_value else self._constants.load(key)
            if real is None:
                return super().create_file_value(var)
            stand_in, var._sym_val.val = var._sym_val.val, real
            try:
                return super().create_file_value(var)
            finally:
                var._sym_val.val = stand_in
                self._written(real.size * var.dtype.get_bitwidth() // 8)

    return StreamingExporter
