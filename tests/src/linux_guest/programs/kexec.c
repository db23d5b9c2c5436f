/*
 * kexec KERNEL INITRAMFS: executes another kernel with the command line of this
 * one, as kexec-tools do with `kexec --force --reuse-cmdline`. The kernel tells
 * its drivers before that.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int open_file(const char *path)
{
	int fd = open(path, O_RDONLY);

	if (fd < 0)
		err(1, "%s", path);
	return fd;
}

int main(int argc, char **argv)
{
	char line[4096] = "";
	FILE *file = fopen("/proc/cmdline", "r");

	if (argc != 3)
		errx(1, "kexec KERNEL INITRAMFS");
	if (!file || !fgets(line, sizeof(line), file))
		err(1, "/proc/cmdline");
	line[strcspn(line, "\n")] = '\0';
	if (syscall(SYS_kexec_file_load, open_file(argv[1]), open_file(argv[2]),
		    strlen(line) + 1, line, 0UL))
		err(1, "kexec_file_load");
	printf("kexec\n");
	fflush(stdout);
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
		LINUX_REBOOT_CMD_KEXEC, NULL);
	err(1, "reboot");
}
