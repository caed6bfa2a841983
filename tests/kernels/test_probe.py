import torch
from torch.export import Dim
from tests.kernels._helpers import opcheck, export, op_node
from fxgraft.kernels.rotary.op import SPEC
from fxgraft.kernels.attention.op import SPEC as A
def test_x():
    x=torch.randn(2,3,5,8); c=torch.randn(1,1,5,8)
    opcheck(SPEC,x,c,c)
    p=export(SPEC.overload,(x,c,c),({0:Dim("batch"),2:Dim("length")},{2:Dim("length")},{2:Dim("length")}))
    print(p); print(SPEC.flops(op_node(p,SPEC)), SPEC.flops(op_node(p,SPEC)).free_symbols)
    q=torch.randn(2,4,5,8);k=torch.randn(2,2,9,8)
    p=export(A.overload,(q,k,k),({0:Dim("batch"),2:Dim("length")},{0:Dim("batch"),2:Dim("total")},{0:Dim("batch"),2:Dim("total")}),scale=.1,window=3)
    print(p); print(A.flops(op_node(p,A)))
    assert 0
