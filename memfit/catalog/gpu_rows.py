"""The rows of `memfit.catalog.gpus`: one a kind of GPU, and the size where a chip is sold with several.

`capacity_bytes` is the total that torch.cuda.mem_get_info reports. CUDA's out-of-memory messages print exactly that
number ("GPU 0 has a total capacity of 23.64 GiB"), which is where most rows have it from; `total_memory=24259MB` of
torch.cuda.get_device_properties, `Max memory: 22.161 GB` in Unsloth's banner (2^30 bytes) and `(NVIDIA A40, 45634MiB)`
in YOLO's are the same number. It moves by up to 0.2 GiB with the driver's branch, and a card with ECC shows less.

Speeds are those of NVIDIA's data sheets and architecture papers, dense. Data sheets print the figure with sparsity,
which is twice as high, in large; for GeForce cards they print products summed in fp16, which is twice as high again.
"""

from __future__ import annotations

from memfit.specs.hardware import GpuLink, GpuRow, GpuSpeed
from memfit.units import GIB, MIB

# Share of the nominal size that is left where nobody has published the figure; rows that use it say "nominal".
NOMINAL_SHARE = 0.965

_T, _G, _MHZ = 1e12, 1e9, 1e6

# Read in public text; everything else comes from data sheets as remembered.
_XFORMERS = "facebookresearch/xformers:xformers/profiler/device_limits.py, after NVIDIA's data sheets"
_FABRIC = "Lightning-AI/pytorch-lightning:src/lightning/fabric/utilities/throughput.py, after NVIDIA's data sheets"
_HMC = "hmc-tech.com's tables, which tell sums in fp16 and fp32 apart"
_GA102 = "NVIDIA Ampere GA102 whitepaper, appendix A"
_ADA = "NVIDIA Ada whitepaper, appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell whitepaper, appendix A"
_TURING = "NVIDIA Turing whitepaper, appendix A"


def _cited(gib: float) -> int:
    return int(gib * GIB)


def _speed(
    products: tuple[float, float | None, float, float | None],
    gigabytes: float,
    clock: tuple[int, int],
    source: str,
    verified: str = "cited",
) -> GpuSpeed:
    """`products`: TFLOP/s in fp32, tf32, fp16, bf16; `gigabytes` (10^9) a second of memory; `clock`: SMs and MHz."""
    fp32, tf32, fp16, bf16 = (None if value is None else value * _T for value in products)
    assert fp32 is not None
    assert fp16 is not None
    return GpuSpeed(fp32, tf32, fp16, bf16, gigabytes * _G, clock[0], clock[1] * _MHZ, verified, source)


def _pcie(generation: int, lanes: int = 16, peer: bool = True) -> GpuLink:
    return GpuLink(generation, lanes, peer=peer, source="data sheet")


def _nvlink(generation: int, links: int, gigabytes: float, reach: str, peer: bool = True) -> GpuLink:
    """`gigabytes` (10^9) a second in one direction over all `links`; data sheets print both directions together."""
    return GpuLink(generation, 16, gigabytes * _G, links, reach, peer, source="data sheet, half of its total bandwidth")


# Chips that data sheets give one figure for, sold with several sizes or on several boards.
_V100 = _speed((15.7, None, 125.0, None), 900, (80, 1530), f"SXM2; {_FABRIC}; bandwidth: {_XFORMERS}")
_V100_LINK = _nvlink(3, 6, 150, "all")
_A100_LINK = _nvlink(4, 12, 300, "all")
_H100_LINK = _nvlink(5, 18, 450, "all")
_H100 = (66.9, 494.7, 989.4, 989.4)
_HOPPER = "meta-pytorch/tritonbench#78 (989.5 without sparsity), NVIDIA H100 whitepaper"
_A100 = (19.5, 156.0, 312.0, 312.0)

# Peer copies: GeForce cards from Turing on have none over PCIe in the stock driver (NVIDIA/nccl-tests#117 shows a
# 2080 Ti saying so; tinygrad/open-gpu-kernel-modules exists to add it to the 4090).
_NO_PEER = False

GPUS: tuple[GpuRow, ...] = (
    GpuRow(
        name="RTX2080Ti",
        chip="RTX2080Ti",
        nominal_gib=11,
        capacity_bytes=11009 * MIB,
        compute_capability="7.5",
        has_bf16=False,
        verified="cited",
        source="(NVIDIA GeForce RTX 2080 Ti, 11009MiB) in public YOLO logs with torch 2.2; 10825MiB with a newer "
        "driver; 10.76 GiB in ispc-lab/TMA#5",
        speed=_speed((13.45, None, 53.8, None), 616, (68, 1545), _TURING, "memory"),
        link=_nvlink(3, 2, 50, "pair", _NO_PEER),
    ),
    GpuRow(
        name="RTX3060-12G",
        chip="RTX3060",
        nominal_gib=12,
        capacity_bytes=_cited(11.75),
        compute_capability="8.6",
        has_bf16=True,
        verified="cited",
        source="11.75 GiB in Kunhao-Liu/StyleGaussian#12; 11.76 GiB in TencentARC/PhotoMaker#47",
        speed=_speed((12.74, 12.74, 25.5, 25.5), 360, (28, 1777), f"{_HMC}; bandwidth: topcpu.net"),
        link=_pcie(4, peer=_NO_PEER),
    ),
    GpuRow(
        name="RTX3080",
        chip="RTX3080",
        nominal_gib=10,
        capacity_bytes=_cited(9.78),
        compute_capability="8.6",
        has_bf16=True,
        verified="cited",
        source="the 10 GiB card: 9.78 GiB in zai-org/CogVideo#34",
        speed=_speed((29.77, 29.8, 59.5, 59.5), 760, (68, 1710), _GA102, "memory"),
        link=_pcie(4, peer=_NO_PEER),
    ),
    GpuRow(
        name="RTX3090",
        chip="RTX3090",
        nominal_gib=24,
        capacity_bytes=_cited(23.69),
        compute_capability="8.6",
        has_bf16=True,
        verified="cited",
        source="total_memory=24259MB (23.69 GiB) in public logs of torch.cuda.get_device_properties; "
        "23.70 GiB in Lightning-AI/lit-llama#137",
        speed=_speed((35.58, 35.6, 71.2, 71.2), 936, (82, 1695), f"{_GA102}; bandwidth: xiaozheyao/triteia"),
        link=_nvlink(4, 4, 56.25, "pair", _NO_PEER),
    ),
    GpuRow(
        name="RTX4060Ti-16G",
        chip="RTX4060Ti",
        nominal_gib=16,
        capacity_bytes=_cited(15.572),
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="'NVIDIA GeForce RTX 4060 Ti. Max memory: 15.572 GB. Platform: Linux' in a public log with torch 2.7",
        speed=_speed((22.06, 22.1, 44.1, 44.1), 288, (34, 2535), f"{_ADA}; clock and bandwidth: cputronic.com"),
        link=_pcie(4, 8, _NO_PEER),
    ),
    GpuRow(
        name="RTX4070TiS",
        chip="RTX4070TiSUPER",
        nominal_gib=16,
        capacity_bytes=16069 * MIB,
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="(NVIDIA GeForce RTX 4070 Ti SUPER, 16069MiB) in public YOLO logs; 16376MiB under Windows",
        speed=_speed((44.1, 44.1, 88.2, 88.2), 672, (66, 2610), f"{_ADA}; clock, SMs and bandwidth: topcpu.net"),
        link=_pcie(4, peer=_NO_PEER),
    ),
    GpuRow(
        name="RTX4080",
        chip="RTX4080",
        nominal_gib=16,
        capacity_bytes=16049 * MIB,
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="total_memory=16049MB of torch.cuda.get_device_properties, in brainglobe's documentation "
        "'Speeding up cellfinder'",
        speed=_speed((48.74, 48.7, 97.5, 97.5), 716.8, (76, 2505), f"{_ADA}; clock, SMs and bandwidth: topcpu.net"),
        link=_pcie(4, peer=_NO_PEER),
    ),
    GpuRow(
        name="RTX4090",
        chip="RTX4090",
        nominal_gib=24,
        capacity_bytes=_cited(23.64),
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="23.64 GiB in ali-vilab/VGen#104 and deepseek-ai/DeepSeek-V3#205; "
        "23.52 GiB with a newer driver in Soul-AILab/SoulX-FlashTalk#5",
        speed=_speed((82.58, 82.58, 165.15, 165.15), 1008, (128, 2520), "waredb.com, 'RTX 4090'"),
        link=_pcie(4, peer=_NO_PEER),
    ),
    GpuRow(
        name="RTX5080",
        chip="RTX5080",
        nominal_gib=16,
        capacity_bytes=15840 * MIB,
        compute_capability="12.0",
        has_bf16=True,
        verified="cited",
        source="(NVIDIA GeForce RTX 5080, 15840MiB) in public YOLO documentation; 16303MiB under Windows",
        speed=_speed((56.28, 56.3, 112.6, 112.6), 960, (84, 2617), _BLACKWELL, "memory"),
        link=_pcie(5, peer=_NO_PEER),
    ),
    GpuRow(
        name="RTX5090",
        chip="RTX5090",
        nominal_gib=32,
        capacity_bytes=_cited(31.37),
        compute_capability="12.0",
        has_bf16=True,
        verified="cited",
        source="31.37 GiB in Wan-Video/Wan2.1#465; 31.36 GiB in TrajectoryCrafter/TrajectoryCrafter#20",
        speed=_speed(
            (104.8, 104.8, 209.5, 209.5),
            1792,
            (170, 2407),
            "a quarter of 838 TFLOP/s, which is sparse and summed in fp16: spheron.network, 'RTX 5090 specs'",
        ),
        link=_pcie(5, peer=_NO_PEER),
    ),
    GpuRow(
        name="TitanRTX",
        chip="TITANRTX",
        nominal_gib=24,
        capacity_bytes=int(NOMINAL_SHARE * 24 * GIB),
        compute_capability="7.5",
        has_bf16=False,
        verified="nominal",
        source="0.965 of the nominal 24 GiB: only the driver's own 24,576 MiB is published",
        speed=_speed((16.31, None, 130.5, None), 672, (72, 1770), _TURING, "memory"),
        link=_nvlink(3, 2, 50, "pair"),
    ),
    GpuRow(
        name="T4",
        chip="T4",
        nominal_gib=16,
        capacity_bytes=_cited(14.56),
        compute_capability="7.5",
        has_bf16=False,
        verified="cited",
        source="14.56 GiB in Zheng-Chong/CatVTON#133 and AlphaGPU/leetgpu-challenges#52; "
        "14.58 GiB with driver 535 in mbzuai-oryx/GeoPixel#5",
        speed=_speed((8.1, None, 65.0, None), 300, (40, 1590), f"{_FABRIC}; bandwidth: {_XFORMERS}"),
        link=_pcie(3),
    ),
    GpuRow(
        name="P40",
        chip="P40",
        nominal_gib=24,
        capacity_bytes=24446 * MIB,
        compute_capability="6.1",
        has_bf16=False,
        verified="cited",
        source="(Tesla P40, 24446MiB) in public YOLO logs, with ECC off; with ECC on a sixteenth less",
        speed=_speed((11.76, None, 11.76, None), 346, (30, 1531), "data sheet; fp16 products run as fp32", "memory"),
        link=_pcie(3),
    ),
    GpuRow(
        name="P100",
        chip="P100",
        nominal_gib=16,
        capacity_bytes=16269 * MIB,
        compute_capability="6.0",
        has_bf16=False,
        verified="cited",
        source="(Tesla P100-PCIE-16GB, 16269MiB) in public YOLO logs with torch 2.11; 16281MiB with older drivers",
        speed=_speed(
            (9.34, None, 9.34, None), 732, (56, 1303), f"PCIe; sums in fp32 run as fp32; bandwidth: {_XFORMERS}"
        ),
        link=_pcie(3),
    ),
    GpuRow(
        name="V100-16G",
        chip="V100",
        nominal_gib=16,
        capacity_bytes=16160 * MIB,
        compute_capability="7.0",
        has_bf16=False,
        verified="cited",
        source="(Tesla V100-SXM2-16GB, 16160MiB) in public YOLO logs; 16130MiB with older drivers",
        speed=_V100,
        link=_V100_LINK,
    ),
    GpuRow(
        name="V100-32G",
        chip="V100",
        nominal_gib=32,
        capacity_bytes=_cited(31.74),
        compute_capability="7.0",
        has_bf16=False,
        verified="cited",
        source="31.74 GiB in haotian-liu/LLaVA#812 and liucongg/ChatGLM-Finetuning#73",
        speed=_V100,
        link=_V100_LINK,
    ),
    GpuRow(
        name="A10",
        chip="A10",
        nominal_gib=24,
        capacity_bytes=_cited(21.99),
        compute_capability="8.6",
        has_bf16=True,
        verified="cited",
        source="21.99 GiB in zai-org/CogVLM#236; with ECC on the driver itself shows 23028 MiB "
        "(modal-labs/modal-client#2797)",
        speed=_speed((31.2, 62.5, 125.0, 125.0), 600, (72, 1695), f"{_FABRIC} (there under the name A10G)"),
        link=_pcie(4),
    ),
    GpuRow(
        name="A10G",
        chip="A10G",
        nominal_gib=24,
        capacity_bytes=_cited(22.0),
        compute_capability="8.6",
        has_bf16=True,
        verified="cited",
        source="(NVIDIA A10G, 22.0 GiB) in public logs; 22.49 GiB with an older driver in "
        "AUTOMATIC1111/stable-diffusion-webui#1259",
        speed=_speed((35.0, 35.0, 70.0, 70.0), 600, (80, 1710), "NVIDIA A10G data sheet for AWS G5", "memory"),
        link=_pcie(4),
    ),
    GpuRow(
        name="A30",
        chip="A30",
        nominal_gib=24,
        capacity_bytes=_cited(23.53),
        compute_capability="8.0",
        has_bf16=True,
        verified="cited",
        source="23.53 GiB in google/RB-Modulation#5",
        speed=_speed((10.3, 82.0, 165.0, 165.0), 933, (56, 1440), _XFORMERS),
        link=_nvlink(4, 4, 100, "pair"),
    ),
    GpuRow(
        name="A40",
        chip="A40",
        nominal_gib=48,
        capacity_bytes=_cited(44.549),
        compute_capability="8.6",
        has_bf16=True,
        verified="cited",
        source="'NVIDIA A40. Max memory: 44.549 GB. Platform: Linux' in a public log",
        speed=_speed((37.42, 74.8, 149.7, 149.7), 696, (84, 1740), f"{_HMC}; bandwidth: sysrqmts.com"),
        link=_nvlink(4, 4, 56.25, "pair"),
    ),
    GpuRow(
        name="A6000",
        chip="RTXA6000",
        nominal_gib=48,
        capacity_bytes=_cited(47.431),
        compute_capability="8.6",
        has_bf16=True,
        verified="cited",
        source="'NVIDIA RTX A6000. Max memory: 47.431 GB. Platform: Linux' in public logs; 44.427 with ECC on",
        speed=_speed((38.71, 77.4, 154.8, 154.8), 768, (84, 1800), "hyperstack.cloud (155 dense); rest: sysrqmts.com"),
        link=_nvlink(4, 4, 56.25, "pair"),
    ),
    GpuRow(
        name="RTX6000Ada",
        chip="RTX6000AdaGeneration",
        nominal_gib=48,
        capacity_bytes=48520 * MIB,
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="(NVIDIA RTX 6000 Ada Generation, 48520MiB) in public YOLO logs with torch 2.7; "
        "44.43 GiB with ECC on in DINGYANB/MTVCrafter#21",
        speed=_speed((91.1, 182.1, 364.2, 364.2), 960, (142, 2505), "NVIDIA RTX 6000 Ada data sheet", "memory"),
        link=_pcie(4),
    ),
    GpuRow(
        name="L4",
        chip="L4",
        nominal_gib=24,
        capacity_bytes=_cited(22.161),
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="'NVIDIA L4. Max memory: 22.161 GB. Platform: Linux' in a public log with torch 2.8; "
        "the driver shows 23034 MiB (NVIDIA/TensorRT-LLM#2398)",
        speed=_speed(
            (30.3, 60.5, 121.0, 121.0), 300, (58, 2040), "half of 242, which is sparse: kentjliu/acml-project1"
        ),
        link=_pcie(4),
    ),
    GpuRow(
        name="L40",
        chip="L40",
        nominal_gib=48,
        capacity_bytes=_cited(44.40),
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="44.40 GiB in QwenLM/Qwen3-VL#2097",
        speed=_speed((90.5, 90.5, 181.05, 181.05), 864, (142, 2490), "hyperstack.cloud, 'L40 vs RTX A6000'"),
        link=_pcie(4),
    ),
    GpuRow(
        name="L40S",
        chip="L40S",
        nominal_gib=48,
        capacity_bytes=_cited(44.42),
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="44.42 GiB in stepfun-ai/Step-Video-T2V#8; 44.53 GiB in Wan-Video/Wan2.1#205",
        speed=_speed((91.6, 183.0, 362.05, 362.05), 864, (142, 2520), f"NVIDIA L40S data sheet; {_HMC} (366)"),
        link=_pcie(4),
    ),
    GpuRow(
        name="A100-40G",
        chip="A100",
        nominal_gib=40,
        capacity_bytes=_cited(39.50),
        compute_capability="8.0",
        has_bf16=True,
        verified="cited",
        source="39.50 GiB in TianheWu/CoSeR#10; 39.59 GiB with an older driver in raoyongming/DenseCLIP#52",
        speed=_speed(_A100, 1555, (108, 1410), f"{_FABRIC}; bandwidth: data sheet"),
        link=_A100_LINK,
    ),
    GpuRow(
        name="A100-80G",
        chip="A100",
        nominal_gib=80,
        capacity_bytes=_cited(79.25),
        compute_capability="8.0",
        has_bf16=True,
        verified="cited",
        source="79.25 GiB in wbfwonderful/Vad-R1#11 and HiDream-ai/VAREdit#6; 79.14 GiB in lianqi1008/Control-GIC#6",
        speed=_speed(_A100, 2039, (108, 1410), f"SXM; {_FABRIC}; bandwidth: data sheet (the PCIe card has 1935)"),
        link=_A100_LINK,
    ),
    GpuRow(
        name="H100-80G",
        chip="H100",
        nominal_gib=80,
        capacity_bytes=_cited(79.11),
        compute_capability="9.0",
        has_bf16=True,
        verified="cited",
        source="79.11 GiB with driver 535 in vllm-project/vllm#27508",
        speed=_speed(_H100, 3350, (132, 1830), f"SXM; {_HOPPER}"),
        link=_H100_LINK,
    ),
    GpuRow(
        name="H100-94G",
        chip="H100",
        nominal_gib=94,
        capacity_bytes=_cited(93.00),
        compute_capability="9.0",
        has_bf16=True,
        verified="cited",
        source="93.00 GiB on an H100 NVL in ali-vilab/VACE#56",
        speed=_speed((60.0, 417.5, 835.5, 835.5), 3938, (132, 1545), "NVIDIA H100 NVL data sheet", "memory"),
        link=_nvlink(5, 12, 300, "pair"),
    ),
    GpuRow(
        name="H100-96G",
        chip="GH200",
        nominal_gib=96,
        capacity_bytes=_cited(94.50),
        compute_capability="9.0",
        has_bf16=True,
        verified="cited",
        source="the H100 of a GH200: 94.50 GiB in public out-of-memory messages, 101.5e9 bytes in a public log",
        speed=_speed(_H100, 4000, (132, 1830), f"{_HOPPER}; bandwidth: stas00/ml-engineering"),
        link=_H100_LINK,
    ),
    GpuRow(
        name="H100-PCIe",
        chip="H100PCIe",
        nominal_gib=80,
        capacity_bytes=int(NOMINAL_SHARE * 80 * GIB),
        compute_capability="9.0",
        has_bf16=True,
        verified="nominal",
        source="0.965 of the nominal 80 GiB: no published figure found for this board",
        speed=_speed(
            (51.2, 378.0, 756.5, 756.5), 2000, (114, 1620), f"half of 1,513, which is sparse: {_FABRIC}; {_XFORMERS}"
        ),
        link=_nvlink(5, 12, 300, "pair"),
    ),
    GpuRow(
        name="H200",
        chip="H200",
        nominal_gib=141,
        capacity_bytes=_cited(139.80),
        compute_capability="9.0",
        has_bf16=True,
        verified="cited",
        source="'NVIDIA H200. Max memory: 139.801 GB. Platform: Linux' in a public log; 139.7 in another",
        speed=_speed(_H100, 4800, (132, 1830), f"{_HOPPER}; allenai/open-instruct#1441"),
        link=_H100_LINK,
    ),
    GpuRow(
        name="B200",
        chip="B200",
        nominal_gib=180,
        capacity_bytes=_cited(178.35),
        compute_capability="10.0",
        has_bf16=True,
        verified="cited",
        source="178.35 GiB in public out-of-memory messages of several projects",
        speed=_speed(
            (75.0, 1125.0, 2250.0, 2250.0), 8000, (148, 1856), "half of FP8's 4.5 PFLOP/s in docs.vultr.com, 'HGX B200'"
        ),
        link=_nvlink(5, 18, 900, "all"),
    ),
)
