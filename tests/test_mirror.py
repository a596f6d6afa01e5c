"Flip averaging: what each kind of output becomes, by value"
import pytest, torch
from torch import nn

from s9_fastai.nets.tta import FlipTTA


class Returns(nn.Module):
    "Makes of its input whatever `f` makes"
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x): return self.f(x)


x = torch.arange(2*3*4*6.).reshape(2, 3, 4, 6)
weights = torch.arange(6.)  # unlike from left to right


def both(f): return FlipTTA(Returns(f))(x)


@pytest.mark.parametrize('f', [lambda x: (x*weights).sum((2, 3)), lambda x: (x*weights).mean((1, 2, 3)), lambda x: (x*weights)[:, 0, 0],
                               lambda x: (x*weights).sum((2, 3)).bfloat16()])
def test_logits_are_averaged(f):
    "Also where there are as many as the image is wide"
    torch.testing.assert_close(both(f), (f(x) + f(x.flip(-1)))/2)


@pytest.mark.parametrize('f', [lambda x: x*weights, lambda x: (x*weights)[:, :1], lambda x: (x*weights)[..., ::2, ::2], lambda x: (x*weights).sum(1),
                               lambda x: (x*weights).repeat(1, 1, 2, 2)])
def test_maps_are_flipped_back(f):
    torch.testing.assert_close(both(f), (f(x) + f(x.flip(-1)).flip(-1))/2)
    torch.testing.assert_close(FlipTTA(Returns(f))(x.flip(-1)), both(f).flip(-1))


def test_what_treats_left_and_right_alike_stays():
    torch.testing.assert_close(both(lambda x: 2*x + 1), 2*x + 1)


@pytest.mark.parametrize('f', [
    lambda x: x.flatten(2).transpose(1, 2), lambda x: torch.zeros(2, 5, 2), lambda x: torch.zeros(2, 6, 4), lambda x: torch.zeros(2, 1, 3, 4, 6),
    lambda x: x.argmax(1), lambda x: x.mean((2, 3)).long(), lambda x: torch.zeros(7, 4), lambda x: x.mean()])
def test_other_outputs_are_refused(f):
    "Tokens, points, a map turned over, whole numbers, boxes of all images, one number"
    with pytest.raises(ValueError, match=r'the output is .* for images \(2, 3, 4, 6\): FlipTTA takes logits'): both(f)


@pytest.mark.parametrize('f', [lambda x: (x, x), lambda x: dict(out=x), lambda x: [x], lambda x: None])
def test_several_outputs_are_refused(f):
    with pytest.raises(TypeError, match='the output is a .*: give FlipTTA a module that returns one tensor'): both(f)


def test_one_of_several_outputs():
    "What the message advises"
    class Out(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
        def forward(self, x): return self.net(x)['out']
    net = Returns(lambda x: dict(out=x*weights))
    torch.testing.assert_close(FlipTTA(Out(net))(x), (x*weights + x*weights.flip(-1))/2)


@pytest.mark.parametrize('shape', [(3, 32, 32), (2, 16, 400), (8,), (2, 3, 4, 8, 8)])
def test_inputs_that_are_no_images(shape):
    with pytest.raises(ValueError, match=r'the input is .*: FlipTTA takes images \(B, C, H, W\)'): FlipTTA(nn.Identity())(torch.zeros(shape))


def test_unet():
    from fastai.vision.learner import create_unet_model
    from torchvision.models import resnet18
    torch.manual_seed(0)
    net, im = create_unet_model(resnet18, 3, (32, 64), pretrained=False).eval(), torch.randn(1, 3, 32, 64)
    with torch.no_grad(): got, y, z = FlipTTA(net)(im), net(im), net(im.flip(-1))
    torch.testing.assert_close(got, (y + z.flip(-1))/2)
    assert got.shape == (1, 3, 32, 64) and (y - z.flip(-1)).abs().max() > 1e-3
