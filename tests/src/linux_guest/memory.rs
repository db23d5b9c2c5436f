//! A process in the guest that writes memory without a break, and verifies all of it.

/// A shell script that prints "begins" and writes memory until [`STOP`] was run. Then it fails if a number is not the
/// last one that it wrote.
///
/// No system call interrupts a round of writes. If the guest runs little else, its CPU changes CR3 seldom, and an
/// emulated CPU keeps the entries of its TLB.
pub const CHANGE_AND_VERIFY: &str = r#"rm -f /tmp/still
    awk 'BEGIN {
        print "begins"
        do { round++; for (i = 0; i < 20000; i++) number[i] = round * 20000 + i } while ((getline line < "/tmp/still") < 0)
        for (i = 0; i < 20000; i++) if (number[i] != round * 20000 + i) wrong++
        print wrong + 0, "numbers are wrong"
        exit wrong > 0
    }'"#;

/// Ends the writes after the current round.
pub const STOP: &str = "touch /tmp/still";
