"What the blocks of a backbone are called in pictures."
import pytest
import torch
from conftest import tiny_dit
from diffusers import UNet2DModel

import dmp_wb as wb
from dmp_wb.look import compare, viz
from dmp_wb.models.backbones import anatomy_of


@pytest.fixture
def unet():
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
                       down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
                       norm_num_groups=4)


def test_blocks_of_a_u_net_are_named_by_their_way(unet):
    assert anatomy_of(unet).names_of(unet, range(5)) == ["down 0", "down 1", "middle", "up 0", "up 1"]
    assert anatomy_of(unet).names_of(unet, [2]) == ["middle"]


def test_blocks_without_names_have_numbers():
    model = tiny_dit()
    assert anatomy_of(model).names_of(model, [0, 1]) == []
    wb.patch(model, wb.DMPConfig())
    panel = compare.panels_of(model, torch.arange(0, 1000, 250))[0]
    assert viz.panel_figure(panel).axes[0].get_title() == "block 0"


def test_gate_pictures_of_a_u_net_say_which_way(unet):
    wb.patch(unet, wb.DMPConfig())
    panel = compare.panels_of(unet, torch.arange(0, 1000, 250))[0]
    titles = [ax.get_title() for ax in viz.panel_figure(panel).axes]
    assert panel.names == titles[:len(panel.names)] and {"down 0", "middle", "up 1"} <= {*titles}
