//! The memory table as the session uses it.

use super::super::super::memory_table::MAX_REGIONS;
use super::super::super::ring_fault::RingFault;
use super::*;

#[test]
fn regions_are_added_and_removed_one_by_one() {
    with_session(|rig| {
        assert_eq!(rig.ask_number(Code::GET_MAX_MEM_SLOTS), MAX_REGIONS as u64);
        rig.add_memory();
        rig.ok(Code::ADD_MEM_REG, region(0, 4096, 0x1000, 4096), [memfd(8192)]);
        rig.ok(Code::REM_MEM_REG, region(GPA, MEMORY_BYTES, USER, 77), []);
        rig.ok(Code::REM_MEM_REG, region(0, 4096, 0x1000, 0), [memfd(1)]);
        let expected = [vec![(GPA, MEMORY_BYTES)], vec![(0, 4096), (GPA, MEMORY_BYTES)], vec![(0, 4096)], vec![]];
        assert_eq!(rig.calls.take(), expected.map(Call::SetMemory));
    });
}

/// QEMU does so when a device is plugged in again over the character device of the previous one.
#[test]
fn set_owner_on_the_same_connection_drops_the_old_memory() {
    with_session(|rig| {
        rig.run(0);
        rig.stop(0);
        rig.calls.take();
        rig.ok(Code::SET_OWNER, [], []);
        rig.add_memory();
        assert_eq!(rig.calls.take(), [Call::SetMemory(vec![]), Call::SetMemory(vec![(GPA, MEMORY_BYTES)])]);
    });
}

#[test]
fn set_owner_keeps_the_memory_of_a_running_ring() {
    with_session(|rig| {
        rig.run(0);
        rig.ok(Code::SET_OWNER, [], []);
        assert_eq!(rig.calls.take(), []);
    });
}

#[test]
fn a_table_replaces_all_regions() {
    with_session(|rig| {
        rig.add_memory();
        let table = [2_u32, 0].iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
        let regions = words(&[0x10000, 4096, 0x9000, 0, 0, 8192, 0x1000, 4096]);
        rig.calls.take();
        rig.ok(Code::SET_MEM_TABLE, [table, regions].concat(), [memfd(4096), memfd(12288)]);
        assert_eq!(rig.calls.take(), [Call::SetMemory(vec![(0, 8192), (0x10000, 4096)])]);
    });
}

#[test]
fn a_table_that_is_refused_leaves_the_old_one_in_force() {
    with_session(|rig| {
        rig.add_memory();
        let overlapping = [vec![2, 0, 0, 0, 0, 0, 0, 0], words(&[0, 8192, 0, 0, 4096, 4096, 0x9000, 0])].concat();
        let error = rig.refused(Code::SET_MEM_TABLE, overlapping, || vec![memfd(8192), memfd(4096)]);
        assert_eq!(error, "SET_MEM_TABLE: the memory region at guest address 0x1000 overlaps the one at 0x0");
        let unknown = rig.refused(Code::REM_MEM_REG, region(GPA, 4096, USER, 0), no_fds);
        assert!(
            unknown.contains("there is no memory region of 0x1000 bytes at guest address 0x100000000"),
            "{unknown}"
        );
        // The old table still translates.
        rig.set_up(0);
        rig.calls.take();
        rig.kick(0);
        assert!(matches!(&rig.calls.take()[..], [Call::Start(_)]));
    });
}

#[test]
fn a_ring_is_located_in_the_memory_table_of_its_start() {
    with_session(|rig| {
        rig.add_memory();
        rig.set_up(0);
        rig.ok(Code::REM_MEM_REG, region(GPA, MEMORY_BYTES, USER, 0), []);
        rig.calls.take();
        rig.kick(0);
        let fault = RingFault::OutsideMemory { part: "descriptor table", user_address: USER, size_bytes: 4096 };
        assert_eq!(rig.calls.take(), [Call::Break(0, fault, false)]);
        rig.ok(Code::ADD_MEM_REG, region(0x8000, MEMORY_BYTES, USER, 0), [memfd(MEMORY_BYTES)]);
        rig.calls.take();
        rig.kick(0);
        let moved = ring_offsets(0).map(|offset| 0x8000 + offset);
        assert!(matches!(&rig.calls.take()[..], [Call::Start(ring)] if ring.gpas == moved));
    });
}

#[test]
fn a_change_of_the_table_does_not_touch_running_rings() {
    with_session(|rig| {
        rig.run(0);
        rig.ok(Code::ADD_MEM_REG, region(0, 4096, 0x1000, 0), [memfd(4096)]);
        assert_eq!(rig.calls.take(), [Call::SetMemory(vec![(0, 4096), (GPA, MEMORY_BYTES)])]);
    });
}
