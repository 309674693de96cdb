/* A file system that decides on modes itself, as CIFS and Azure Files do: in $MODES_FOLDER every new file has mode 0755,
   but for what the octal $MODES_MASK takes away, and chmod is not permitted. For LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int is_there(const char *path) {
    const char *folder = getenv("MODES_FOLDER");
    return path && folder && !strncmp(path, folder, strlen(folder));
}

static int is_open_there(int descriptor) {
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    return readlink(link, path, sizeof path - 1) > 0 && is_there(path);
}

static int denied(void) {
    errno = EPERM;
    return -1;
}

static int really_fchmod(int descriptor, mode_t mode) {
    return ((int (*)(int, mode_t))dlsym(RTLD_NEXT, "fchmod"))(descriptor, mode);
}

#define OPEN(name)                                                                                                \
    int name(const char *path, int flags, ...) {                                                                 \
        va_list arguments;                                                                                       \
        va_start(arguments, flags);                                                                              \
        mode_t mode = flags & O_CREAT ? va_arg(arguments, mode_t) : 0;                                           \
        va_end(arguments);                                                                                       \
        int descriptor = ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode);          \
        const char *mask = getenv("MODES_MASK");                                                                 \
        if (descriptor >= 0 && flags & O_CREAT && is_there(path))                                                \
            really_fchmod(descriptor, 0755 & ~(mask ? strtol(mask, 0, 8) : 0));                                  \
        return descriptor;                                                                                       \
    }
OPEN(open)
OPEN(open64)

int fchmod(int descriptor, mode_t mode) {
    return is_open_there(descriptor) ? denied() : really_fchmod(descriptor, mode);
}

int chmod(const char *path, mode_t mode) {
    return is_there(path) ? denied() : ((int (*)(const char *, mode_t))dlsym(RTLD_NEXT, "chmod"))(path, mode);
}
