//! The configuration of a machine, and its limits.

use ringpass_bare_metal::RamRegion;
use ringpass_bare_metal::map;

use crate::VmmError;

/// The configuration of a machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to 4. Each drives one queue.
    pub vcpus: u32,
    /// The guest's RAM, as the guest learns it. It must leave 3 GiB to 4 GiB free. The machine does not create its
    /// memory slots.
    pub ram: Vec<RamRegion>,
    /// Maximum number of blocks of a vCPU's job. Each block takes 8 bytes of the program's memory.
    pub blocks_max: u64,
}

/// Refuses numbers out of range, and RAM that the program cannot reach or that overlaps it.
pub(crate) fn check(config: &MachineConfig) -> Result<(), VmmError> {
    let MachineConfig { vcpus, ref ram, blocks_max } = *config;
    if vcpus == 0 || vcpus > map::VCPUS_MAX {
        return Err(VmmError::Config { what: "the number of vCPUs", value: vcpus.into(), must: "from 1 to 4" });
    }
    if blocks_max > 1 << 24 {
        return Err(VmmError::Config { what: "blocks_max", value: blocks_max, must: "at most 16777216" });
    }
    for &RamRegion { gpa, len_bytes } in ram {
        let end = gpa.checked_add(len_bytes).filter(|end| *end <= map::DIRECT_MAP_BYTES);
        let end = end.ok_or(VmmError::RamOutOfReach { gpa, len_bytes, end_gpa_max: map::DIRECT_MAP_BYTES })?;
        if gpa < map::RESERVED_END_GPA && end > map::PROGRAM_GPA {
            return Err(VmmError::RamInTheWay { gpa, len_bytes });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_ram(gpa: u64, len_bytes: u64) -> Result<(), VmmError> {
        check(&MachineConfig { vcpus: 1, ram: vec![RamRegion { gpa, len_bytes }], blocks_max: 0 })
    }

    #[test]
    fn ram_beyond_the_direct_map_is_refused() {
        let end = map::DIRECT_MAP_BYTES;
        for (gpa, len_bytes) in [(end, 4096), (end - 4096, 8192), (u64::MAX - 4095, 4096), (4096, u64::MAX)] {
            let refused = check_ram(gpa, len_bytes);
            assert!(matches!(refused, Err(VmmError::RamOutOfReach { .. })), "{gpa:#x}, {len_bytes}: {refused:?}");
        }
        check_ram(end - 4096, 4096).expect("it ends where the direct map ends");
    }

    #[test]
    fn ram_that_overlaps_the_program_is_refused() {
        for (gpa, len_bytes) in [(0, map::PROGRAM_GPA + 1), (map::RESERVED_END_GPA - 1, 1)] {
            assert!(matches!(check_ram(gpa, len_bytes), Err(VmmError::RamInTheWay { .. })));
        }
        check_ram(0, map::PROGRAM_GPA).expect("below the program");
        check_ram(map::RESERVED_END_GPA, 4096).expect("above the program");
    }
}
