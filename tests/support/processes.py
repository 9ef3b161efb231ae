"""The start of scripts that tests run in separate processes."""

import grasp_hf

# After these lines, an import of `grasp_hf.x` skips the package's `__init__`, which takes seconds.
WITHOUT_TORCH = f"""
import sys, types

package = sys.modules["grasp_hf"] = types.ModuleType("grasp_hf")
package.__path__ = {grasp_hf.__path__!r}
"""
