from __future__ import annotations

import pytest
from torch._dynamo import trace_rules

# Of what an operator may call: functions that later versions of PyTorch trace and 2.11 does not.
LATER = (
    "torch._C._is_autocast_available",
    "torch._C._functorch.get_dynamic_layer_stack_depth",
    "torch._foreach_clone",
    "torch.cuda.manual_seed",
    "torch.cuda.synchronize",
    "torch.set_autocast_dtype",
)


@pytest.fixture(autouse=True, scope="module")
def _traced_by_the_rules_of_the_oldest_torch():
    with pytest.MonkeyPatch.context() as patch:
        for rules in trace_rules.torch_name_rule_map:
            for name in LATER:
                patch.delitem(rules, name, raising=False)
        trace_rules.get_torch_obj_rule_map.cache_clear()
        yield
    trace_rules.get_torch_obj_rule_map.cache_clear()
