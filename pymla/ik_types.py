"""Type numbers of ik_llama.cpp that ggml has not: names and sizes.

The numbers are those of ``ggml/include/ggml.h`` there, sizes those of ``ggml-common.h``, commit 8337e4cd (August 2026).
Left out are types of activations, which no file holds, and I2_S, whose scale is one for a whole tensor.
"""

from typing import NamedTuple


class Layout(NamedTuple):
    """Size of a type. A row of weights takes ``row_header + blocks * block_bytes`` bytes."""

    qtype: int
    name: str
    block_size: int
    block_bytes: int
    row_header: int = 0
    #: Rows whose blocks lie together. Their headers come first.
    rows_together: int = 1


#: Rows of IQ1_M_R4 by themselves. No file has this type: numbers of files are not negative.
IQ1_M_ROWS = Layout(-229, "IQ1_M_R1", 256, 58)

IK_LAYOUTS = (
    Layout(133, "Q6_0", 32, 26),
    Layout(134, "IQ1_BN", 64, 13, row_header=2),
    Layout(135, "IQ2_BN", 64, 16, row_header=4),
    Layout(137, "IQ2_K", 256, 76),
    Layout(138, "IQ3_K", 256, 110),
    Layout(139, "IQ4_K", 256, 144),
    Layout(140, "IQ5_K", 256, 176),
    Layout(141, "IQ6_K", 256, 212),
    Layout(144, "IQ4_KS", 256, 136, row_header=4),
    Layout(145, "IQ2_KS", 256, 70, row_header=2),
    Layout(146, "IQ4_KSS", 256, 128, row_header=4),
    Layout(151, "Q8_KV", 32, 32, row_header=8),
    Layout(152, "IQ5_KS", 256, 168, row_header=4),
    Layout(153, "IQ2_KT", 256, 68, row_header=4),
    Layout(154, "IQ3_KT", 256, 100, row_header=4),
    Layout(155, "IQ4_KT", 256, 128, row_header=4),
    Layout(156, "IQ3_KS", 256, 102, row_header=2),
    Layout(157, "IQ2_KL", 256, 86, row_header=2),
    Layout(158, "IQ1_KT", 256, 56, row_header=4),
    Layout(202, "Q4_0_R8", 32, 18, rows_together=8),
    Layout(206, "Q5_0_R4", 32, 22, rows_together=4),
    Layout(208, "Q8_0_R8", 32, 34, rows_together=8),
    Layout(210, "Q2_K_R4", 256, 84, rows_together=4),
    Layout(211, "Q3_K_R4", 256, 110, rows_together=4),
    Layout(212, "Q4_K_R4", 256, 144, rows_together=4),
    Layout(213, "Q5_K_R4", 256, 176, rows_together=4),
    Layout(214, "Q6_K_R4", 256, 210, rows_together=4),
    Layout(216, "IQ2_XXS_R4", 256, 66, rows_together=4),
    Layout(217, "IQ2_XS_R4", 256, 74, rows_together=4),
    Layout(218, "IQ3_XXS_R4", 256, 98, rows_together=4),
    Layout(219, "IQ1_S_R4", 32, 6, row_header=2, rows_together=4),
    Layout(220, "IQ4_NL_R4", 32, 18, rows_together=4),
    Layout(221, "IQ3_S_R4", 256, 110, rows_together=4),
    Layout(222, "IQ2_S_R4", 256, 82, rows_together=4),
    Layout(223, "IQ4_XS_R8", 256, 136, rows_together=8),
    Layout(229, "IQ1_M_R4", 32, 7, row_header=2, rows_together=4),
    Layout(230, "BF16_R16", 2, 4, rows_together=16),
    Layout(233, "Q6_0_R4", 32, 26, rows_together=4),
    Layout(335, "IQ2_BN_R4", 64, 16, row_header=4, rows_together=4),
    Layout(337, "IQ2_K_R4", 256, 76, rows_together=4),
    Layout(338, "IQ3_K_R4", 256, 110, rows_together=4),
    Layout(339, "IQ4_K_R4", 256, 144, rows_together=4),
    Layout(340, "IQ5_K_R4", 256, 176, rows_together=4),
    Layout(344, "IQ4_KS_R4", 256, 136, row_header=4, rows_together=4),
    Layout(352, "IQ5_KS_R4", 256, 168, row_header=4, rows_together=4),
    Layout(353, "MXFP4_R8", 32, 17, rows_together=8),
    Layout(397, "Q8_K_R16", 256, 258, rows_together=16),
    Layout(398, "Q8_KV_R8", 32, 32, row_header=4, rows_together=8),
    Layout(399, "Q8_K_R8", 256, 258, rows_together=8),
)
