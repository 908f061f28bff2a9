//! Codes in 32-bit words: one dense bitstream, which every output format of ours is made of.
//!
//! Least significant bit first: code `i` of `bits` bits occupies bits `i * bits` to
//! `i * bits + bits − 1` of the stream, its lowest bit first, and bit `k` of the stream is bit
//! `k % 32` of word `k / 32`. 2-, 4- and 8-bit codes never straddle words; 32 codes of 3 bits fill
//! exactly three words, with code 10 on bits 30, 31 and 0 and code 21 on bits 31, 0 and 1. A stream
//! ends with its last code; the spare bits of its last word are zero. Rows (or columns) of a
//! weight are separate streams, so each begins on a word.
//!
//! compressed-tensors ≥ 0.18, GPTQ (transposed) and MLX all store this stream.

/// Words that `n` codes of `bits` bits take; `None` on overflow.
pub fn words_for(n: usize, bits: u8) -> Option<usize> {
    Some(n.checked_mul(usize::from(bits))?.div_ceil(32))
}

/// Packs `codes` (each below 2^bits) into as few words as hold them; spare bits are zero.
pub fn pack(codes: &[u8], bits: u8) -> Vec<u32> {
    let mut words = Vec::with_capacity((codes.len() * usize::from(bits)).div_ceil(32));
    let (mut pending, mut n_pending) = (0u64, 0u32);
    for code in codes {
        pending |= u64::from(*code) << n_pending;
        n_pending += u32::from(bits);
        if n_pending >= 32 {
            words.push(pending as u32);
            pending >>= 32;
            n_pending -= 32;
        }
    }
    if n_pending > 0 {
        words.push(pending as u32);
    }
    words
}

/// The first `n` codes of the stream, and whether every bit after them is zero; words that are
/// missing read as zero.
pub fn unpack(words: &[u32], bits: u8, n: usize) -> Unpacked {
    let mask = (1u64 << bits) - 1;
    let mut words = words.iter();
    let (mut pending, mut n_pending) = (0u64, 0u32);
    let mut codes = Vec::with_capacity(n);
    for _ in 0..n {
        if n_pending < u32::from(bits) {
            pending |= u64::from(words.next().copied().unwrap_or(0)) << n_pending;
            n_pending += 32;
        }
        codes.push((pending & mask) as u8);
        pending >>= bits;
        n_pending -= u32::from(bits);
    }
    let padding_is_zero = pending == 0 && words.all(|w| *w == 0);
    Unpacked {
        codes,
        padding_is_zero,
    }
}

/// What [`unpack`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// The codes, each below 2^bits.
    pub codes: Vec<u8>,
    /// Whether every bit after the last code is zero, as [`pack`] leaves them.
    pub padding_is_zero: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn three_bit_codes_straddle_words() {
        let words = pack(&[7; 11], 3);
        assert_eq!(words, [u32::MAX, 1]);
        assert!(unpack(&words, 3, 11).padding_is_zero);
        assert!(!unpack(&words, 3, 10).padding_is_zero);
    }

    /// 32 codes in three words, the two straddling ones as described above.
    #[test]
    fn three_bit_layout() {
        let code = |position: usize, value: u8| {
            let mut codes = [0; 32];
            codes[position] = value;
            pack(&codes, 3)
        };
        assert_eq!(code(0, 0b111), [0b111, 0, 0]);
        assert_eq!(code(9, 0b101), [0b101 << 27, 0, 0]);
        assert_eq!(code(10, 0b001), [1 << 30, 0, 0]);
        assert_eq!(code(10, 0b110), [1 << 31, 1, 0]);
        assert_eq!(code(11, 0b001), [0, 1 << 1, 0]);
        assert_eq!(code(21, 0b011), [0, 1 << 31, 1]);
        assert_eq!(code(21, 0b100), [0, 0, 1 << 1]);
        assert_eq!(code(22, 0b001), [0, 0, 1 << 2]);
        assert_eq!(code(31, 0b111), [0, 0, 0b111 << 29]);
    }

    #[test]
    fn codes_within_words() {
        assert_eq!(pack(&[3, 2, 1, 0, 3], 2), [0b11_00_01_10_11]);
        assert_eq!(pack(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 4), [0x8765_4321, 9]);
        assert_eq!(pack(&[0xEF, 0xBE, 0xAD, 0xDE, 1], 8), [0xDEAD_BEEF, 1]);
        assert_eq!(pack(&[], 4), [0u32; 0]);
        assert_eq!(words_for(usize::MAX, 8), None);
    }

    proptest! {
        #[test]
        fn unpack_inverts_pack(
            bits in prop::sample::select(vec![2u8, 3, 4, 8]),
            raw in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let codes: Vec<u8> = raw.iter().map(|c| c & ((1u16 << bits) - 1) as u8).collect();
            let words = pack(&codes, bits);
            prop_assert_eq!(Some(words.len()), words_for(codes.len(), bits));
            let back = unpack(&words, bits, codes.len());
            prop_assert_eq!(back.codes, codes);
            prop_assert!(back.padding_is_zero);
        }
    }
}
