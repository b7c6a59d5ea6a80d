"""Type numbers of ik_llama.cpp that ggml has not: names and sizes.

The numbers are those of ``ggml/include/ggml.h`` there, sizes those of ``ggml-common.h``, commit 8337e4cd (August 2026).
Left out are types of activations, which no file holds, and I2_S, whose scale is one for a whole tensor.
"""

from typing import NamedTuple


class IkType(NamedTuple):
    """Size of a type. A row of weights takes ``row_header + blocks * block_bytes`` bytes."""

    qtype: int
    name: str
    block_size: int
    block_bytes: int
    row_header: int = 0
    #: Rows whose blocks lie together. Their headers come first.
    rows: int = 1


IK_TYPES = (
    IkType(133, "Q6_0", 32, 26),
    IkType(134, "IQ1_BN", 64, 13, row_header=2),
    IkType(135, "IQ2_BN", 64, 16, row_header=4),
    IkType(137, "IQ2_K", 256, 76),
    IkType(138, "IQ3_K", 256, 110),
    IkType(139, "IQ4_K", 256, 144),
    IkType(140, "IQ5_K", 256, 176),
    IkType(141, "IQ6_K", 256, 212),
    IkType(144, "IQ4_KS", 256, 136, row_header=4),
    IkType(145, "IQ2_KS", 256, 70, row_header=2),
    IkType(146, "IQ4_KSS", 256, 128, row_header=4),
    IkType(151, "Q8_KV", 32, 32, row_header=8),
    IkType(152, "IQ5_KS", 256, 168, row_header=4),
    IkType(153, "IQ2_KT", 256, 68, row_header=4),
    IkType(154, "IQ3_KT", 256, 100, row_header=4),
    IkType(155, "IQ4_KT", 256, 128, row_header=4),
    IkType(156, "IQ3_KS", 256, 102, row_header=2),
    IkType(157, "IQ2_KL", 256, 86, row_header=2),
    IkType(158, "IQ1_KT", 256, 56, row_header=4),
    IkType(202, "Q4_0_R8", 32, 18, rows=8),
    IkType(206, "Q5_0_R4", 32, 22, rows=4),
    IkType(208, "Q8_0_R8", 32, 34, rows=8),
    IkType(210, "Q2_K_R4", 256, 84, rows=4),
    IkType(211, "Q3_K_R4", 256, 110, rows=4),
    IkType(212, "Q4_K_R4", 256, 144, rows=4),
    IkType(213, "Q5_K_R4", 256, 176, rows=4),
    IkType(214, "Q6_K_R4", 256, 210, rows=4),
    IkType(216, "IQ2_XXS_R4", 256, 66, rows=4),
    IkType(217, "IQ2_XS_R4", 256, 74, rows=4),
    IkType(218, "IQ3_XXS_R4", 256, 98, rows=4),
    IkType(219, "IQ1_S_R4", 32, 6, row_header=2, rows=4),
    IkType(220, "IQ4_NL_R4", 32, 18, rows=4),
    IkType(221, "IQ3_S_R4", 256, 110, rows=4),
    IkType(222, "IQ2_S_R4", 256, 82, rows=4),
    IkType(223, "IQ4_XS_R8", 256, 136, rows=8),
    IkType(229, "IQ1_M_R4", 32, 7, row_header=2, rows=4),
    IkType(230, "BF16_R16", 2, 4, rows=16),
    IkType(233, "Q6_0_R4", 32, 26, rows=4),
    IkType(335, "IQ2_BN_R4", 64, 16, row_header=4, rows=4),
    IkType(337, "IQ2_K_R4", 256, 76, rows=4),
    IkType(338, "IQ3_K_R4", 256, 110, rows=4),
    IkType(339, "IQ4_K_R4", 256, 144, rows=4),
    IkType(340, "IQ5_K_R4", 256, 176, rows=4),
    IkType(344, "IQ4_KS_R4", 256, 136, row_header=4, rows=4),
    IkType(352, "IQ5_KS_R4", 256, 168, row_header=4, rows=4),
    IkType(353, "MXFP4_R8", 32, 17, rows=8),
    IkType(397, "Q8_K_R16", 256, 258, rows=16),
    IkType(398, "Q8_KV_R8", 32, 32, row_header=4, rows=8),
    IkType(399, "Q8_K_R8", 256, 258, rows=8),
)
