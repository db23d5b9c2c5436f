//! Descriptors of a split virtqueue (VIRTIO 1.2, 2.7.5).

use anyhow::Result;

/// Descriptor flag: the next descriptor belongs to this chain.
pub const F_NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer.
pub const F_WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const F_INDIRECT: u16 = 4;

/// A descriptor (VIRTIO 1.2, 2.7.5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address of the buffer.
    pub gpa: u64,
    /// Length of the buffer in bytes.
    pub len_bytes: u32,
    /// `F_NEXT`, `F_WRITE`, `F_INDIRECT`.
    pub flags: u16,
    /// Index of the next descriptor, with `F_NEXT`.
    pub next: u16,
}

/// Length of a descriptor in bytes.
pub const DESCRIPTOR_BYTES: u64 = 16;

impl Descriptor {
    /// A buffer that the device reads.
    pub fn readable(gpa: u64, len_bytes: u32) -> Self {
        Self { gpa, len_bytes, ..Self::default() }
    }

    /// A buffer that the device writes.
    pub fn writable(gpa: u64, len_bytes: u32) -> Self {
        Self { gpa, len_bytes, flags: F_WRITE, next: 0 }
    }

    /// A table of descriptors.
    pub fn indirect(gpa: u64, len_bytes: u32) -> Self {
        Self { gpa, len_bytes, flags: F_INDIRECT, next: 0 }
    }

    /// The same descriptor with `next` behind it in its chain.
    pub fn linked_to(self, next: u16) -> Self {
        Self { flags: self.flags | F_NEXT, next, ..self }
    }

    /// The bytes of the descriptor in memory.
    pub fn to_bytes(self) -> [u8; DESCRIPTOR_BYTES as usize] {
        let mut bytes = [0; DESCRIPTOR_BYTES as usize];
        bytes[..8].copy_from_slice(&self.gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len_bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// The bytes of a table that holds this chain from its first entry on, each descriptor linked to the next.
///
/// # Errors
///
/// The chain has more descriptors than a table can number.
pub fn linked_table(chain: &[Descriptor]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(chain.len() * DESCRIPTOR_BYTES as usize);
    for (index, &descriptor) in chain.iter().enumerate() {
        let is_last = index + 1 == chain.len();
        let linked = if is_last { descriptor } else { descriptor.linked_to(u16::try_from(index + 1)?) };
        bytes.extend_from_slice(&linked.to_bytes());
    }
    Ok(bytes)
}
