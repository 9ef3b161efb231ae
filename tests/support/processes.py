"""Scripts that tests run in processes of their own."""

import grasp_hf

# The start of a script: its imports of `grasp_hf.x` skip the package's `__init__`, which takes seconds.
WITHOUT_TORCH = f"""
import sys, types

package = sys.modules["grasp_hf"] = types.ModuleType("grasp_hf")
package.__path__ = {grasp_hf.__path__!r}
"""
