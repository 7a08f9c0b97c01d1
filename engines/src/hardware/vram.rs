//! The memory of Intel's cards, as their drivers tell it.
//!
//! Only an `ioctl` tells: `DRM_IOCTL_XE_DEVICE_QUERY` and `DRM_IOCTL_I915_QUERY`, of the kernel's
//! `include/uapi/drm/xe_drm.h` and `i915_drm.h`, from which the layouts here are. Other drivers have files.

/// The size of a card's memory, and what of it is in use, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Vram {
    pub(super) total_bytes: Option<u64>,
    pub(super) used_bytes: Option<u64>,
}

/// Bytes of a region in the answers of both drivers.
const REGION_BYTES: usize = 88;
/// The class of a region that is the card's own.
const OWN: u16 = 1;

/// Sums what `used` tells of the card's own regions.
fn sum(regions: &[u8], count: u32, used: impl Fn(&[u8; REGION_BYTES]) -> Option<u64>) -> Vram {
    let (regions, _) = regions.as_chunks::<REGION_BYTES>();
    let own = regions.iter().take(count as usize).filter(|region| u16::from_ne_bytes([region[0], region[1]]) == OWN);
    let mut vram = Vram::default();
    for (index, region) in own.enumerate() {
        vram.total_bytes = Some(vram.total_bytes.unwrap_or(0).saturating_add(word(region, 8)));
        // One region whose use is not told makes the sum unknown.
        let known = if index == 0 { Some(0) } else { vram.used_bytes };
        vram.used_bytes = known.zip(used(region)).map(|(sum, used): (u64, u64)| sum.saturating_add(used));
    }
    vram
}

/// The 64-bit word at byte `at`.
fn word(region: &[u8; REGION_BYTES], at: usize) -> u64 {
    let bytes = &region[at..at + 8];
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

/// Reads an answer of xe: `drm_xe_query_mem_regions`. Until Linux 6.17 only the privileged are told what is in use,
/// and others 0.
fn of_xe(answer: &[u8]) -> Option<Vram> {
    let (header, regions) = answer.split_first_chunk::<8>()?;
    let count = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
    Some(sum(regions, count, |region| Some(word(region, 16)).filter(|&used| used > 0)))
}

/// Reads an answer of i915: `drm_i915_query_memory_regions`. Those without the privilege are told that all is free.
fn of_i915(answer: &[u8]) -> Option<Vram> {
    let (header, regions) = answer.split_first_chunk::<16>()?;
    let count = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
    let used = |region: &[u8; REGION_BYTES]| word(region, 8).checked_sub(word(region, 16)).filter(|&used| used > 0);
    Some(sum(regions, count, used))
}

/// Asks the driver of a card through its render node. `None`: it cannot be asked.
#[cfg(target_os = "linux")]
pub(super) fn ask(node: &std::path::Path, driver: &str) -> Option<Vram> {
    let open = || std::fs::OpenOptions::new().read(true).write(true).open(node).ok();
    match driver {
        "xe" => of_xe(&ioctl::xe_regions(&open()?)?),
        "i915" => of_i915(&ioctl::i915_regions(&open()?)?),
        _ => None,
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn ask(_: &std::path::Path, _: &str) -> Option<Vram> {
    None
}

#[cfg(target_os = "linux")]
mod ioctl {
    use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
    use std::fs::File;

    /// The longest answer that is read: a device has a few regions.
    const ANSWER_BYTES_MAX: usize = 64 << 10;

    #[repr(C)]
    #[derive(Debug, Default)]
    struct XeQuery {
        extensions: u64,
        query: u32,
        size: u32,
        data: u64,
        reserved: [u64; 2],
    }

    #[repr(C)]
    #[derive(Debug)]
    struct I915Query {
        items: u32,
        flags: u32,
        items_pointer: u64,
    }

    #[repr(C)]
    #[derive(Debug)]
    struct I915Item {
        query: u64,
        length: i32,
        flags: u32,
        data: u64,
    }

    const XE_QUERY: Opcode = opcode::read_write::<XeQuery>(b'd', 0x40);
    const XE_MEMORY_REGIONS: u32 = 1;
    const I915_QUERY: Opcode = opcode::read_write::<I915Query>(b'd', 0x79);
    const I915_MEMORY_REGIONS: u64 = 4;

    /// The drivers read and write words of 64 bits.
    fn zeros(bytes: usize) -> Option<Vec<u64>> {
        (0 < bytes && bytes <= ANSWER_BYTES_MAX).then(|| vec![0; bytes.div_ceil(8)])
    }

    pub(super) fn xe_regions(file: &File) -> Option<Vec<u8>> {
        let mut query = XeQuery { query: XE_MEMORY_REGIONS, ..XeQuery::default() };
        // SAFETY: the driver fills the size in, as the query has none yet.
        unsafe { ioctl(file, Updater::<XE_QUERY, _>::new(&mut query)) }.ok()?;
        let mut answer = zeros(query.size as usize)?;
        query.data = answer.as_mut_ptr() as u64;
        // SAFETY: `data` points to at least `size` bytes, which nothing else uses.
        unsafe { ioctl(file, Updater::<XE_QUERY, _>::new(&mut query)) }.ok()?;
        Some(bytemuck::cast_slice(&answer).to_vec())
    }

    pub(super) fn i915_regions(file: &File) -> Option<Vec<u8>> {
        let mut item = I915Item { query: I915_MEMORY_REGIONS, length: 0, flags: 0, data: 0 };
        let ask = |item: &mut I915Item| -> Option<usize> {
            let mut query = I915Query { items: 1, flags: 0, items_pointer: std::ptr::from_mut(item) as u64 };
            // SAFETY: the pointer is to one item; its data is none, or `length` bytes that nothing else uses.
            unsafe { ioctl(file, Updater::<I915_QUERY, _>::new(&mut query)) }.ok()?;
            usize::try_from(item.length).ok()
        };
        let mut answer = zeros(ask(&mut item)?)?;
        item.data = answer.as_mut_ptr() as u64;
        ask(&mut item)?;
        Some(bytemuck::cast_slice(&answer).to_vec())
    }

    #[cfg(test)]
    #[test]
    fn numbers_are_those_of_the_headers() {
        assert_eq!((XE_QUERY, I915_QUERY), (0xC028_6440, 0xC010_6479));
        assert_eq!(size_of::<I915Item>(), 24);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(class: u16, words: &[u64]) -> Vec<u8> {
        let mut region = vec![0; REGION_BYTES];
        region[..2].copy_from_slice(&class.to_ne_bytes());
        for (index, word) in words.iter().enumerate() {
            region[8 + 8 * index..16 + 8 * index].copy_from_slice(&word.to_ne_bytes());
        }
        region
    }

    fn answer(header: usize, regions: &[Vec<u8>]) -> Vec<u8> {
        let mut answer = vec![0; header];
        answer[..4].copy_from_slice(&(regions.len() as u32).to_ne_bytes());
        answer.extend(regions.concat());
        answer
    }

    /// The machine's memory does not count; what only the privileged are told is unknown to others, and not 0.
    #[test]
    fn a_cards_regions_are_summed() {
        let known = |total, used| Some(Vram { total_bytes: Some(total), used_bytes: used });
        assert_eq!(of_xe(&answer(8, &[region(0, &[64, 9]), region(1, &[12, 5])])), known(12, Some(5)));
        assert_eq!(of_xe(&answer(8, &[region(1, &[12, 5]), region(1, &[12, 0])])), known(24, None));
        assert_eq!(of_i915(&answer(16, &[region(0, &[64, 64]), region(1, &[16, 11])])), known(16, Some(5)));
        assert_eq!(of_i915(&answer(16, &[region(1, &[16, 16])])), known(16, None));
        assert_eq!(of_xe(&answer(8, &[region(0, &[64, 9])])), Some(Vram::default()), "an integrated GPU");
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = (of_xe(&bytes), of_i915(&bytes));
        }
    }
}
