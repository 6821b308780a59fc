/* Fails or ends the process at its k-th system call on a database, for test_every_call.py.

   Preloaded (LD_PRELOAD); sleeps until struck_arm().  Counts the calls of the chosen kinds on
   files whose path contains "queue.db", among them SQLite's own and dramalite's side file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { WRITE = 1, READ = 2, SYNC = 4, TRUNCATE = 8, OPEN = 16, MAP = 32, LOCK = 64, UNLINK = 128 };
enum { KILL_BEFORE = -1, KILL_AFTER = -2, KILL_HALFWAY = -3, HALF_THEN_FULL = -4 };

static int kinds, at, action, lasts, seen;

void struck_arm(int wanted_kinds, int wanted_at, int wanted_action, int wanted_lasts)
{
    seen = 0;
    at = wanted_at;
    action = wanted_action;
    lasts = wanted_lasts;
    kinds = wanted_kinds;
}

/* Stop counting; how many calls there were. */
int struck_disarm(void)
{
    kinds = 0;
    return seen;
}

static int names_database(const char *path)
{
    return strstr(path, "queue.db") != NULL;
}

static int is_database(int fd, int kind)
{
    char link[40], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    if (kind == LOCK && size > 5 && strcmp(path + size - 5, "-lock") == 0)
        return 0; /* Its locks are not SQLite's: who gets one is a matter of their own. */
    return names_database(path);
}

/* What is to happen to this call: 0 nothing, an error number, or one of the actions. */
static int count(int kind)
{
    int number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (number != at && !(lasts && number > at))
        return 0;
    if (action == HALF_THEN_FULL)
        return number == at && kind == WRITE ? HALF_THEN_FULL : ENOSPC;
    if (action == KILL_BEFORE)
        kill(getpid(), SIGKILL);
    return action;
}

static int strike(int kind, int fd)
{
    int saved = errno, what = 0;
    if ((kinds & kind) && is_database(fd, kind))
        what = count(kind);
    errno = saved;
    return what;
}

static int strike_path(int kind, const char *path)
{
    return (kinds & kind) && names_database(path) ? count(kind) : 0;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define STRUCK(what, failure) \
    if ((what) > 0) { errno = (what); return (failure); }

#define DONE(what) \
    if ((what) == KILL_AFTER) kill(getpid(), SIGKILL)

#define WRITER(name, parameters, whole, half) \
    ssize_t name parameters \
    { \
        REAL(name); \
        int what = strike(WRITE, fd); \
        STRUCK(what, -1) \
        ssize_t written = what == KILL_HALFWAY || what == HALF_THEN_FULL ? real half : real whole; \
        if (what == KILL_HALFWAY) \
            kill(getpid(), SIGKILL); \
        DONE(what); \
        return written; \
    }

WRITER(write, (int fd, const void *from, size_t size), (fd, from, size), (fd, from, (size + 1) / 2))
WRITER(pwrite, (int fd, const void *from, size_t size, off_t where), (fd, from, size, where),
       (fd, from, (size + 1) / 2, where))
WRITER(pwrite64, (int fd, const void *from, size_t size, off64_t where), (fd, from, size, where),
       (fd, from, (size + 1) / 2, where))

#define CALL(type, name, kind, parameters, arguments, failure) \
    type name parameters \
    { \
        REAL(name); \
        int what = strike(kind, fd); \
        STRUCK(what, failure) \
        type result = real arguments; \
        DONE(what); \
        return result; \
    }

CALL(ssize_t, pread, READ, (int fd, void *to, size_t size, off_t where), (fd, to, size, where), -1)
CALL(ssize_t, pread64, READ, (int fd, void *to, size_t size, off64_t where), (fd, to, size, where), -1)
CALL(int, fsync, SYNC, (int fd), (fd), -1)
CALL(int, fdatasync, SYNC, (int fd), (fd), -1)
CALL(int, ftruncate, TRUNCATE, (int fd, off_t size), (fd, size), -1)
CALL(int, ftruncate64, TRUNCATE, (int fd, off64_t size), (fd, size), -1)
CALL(void *, mmap, MAP, (void *a, size_t size, int p, int f, int fd, off_t w), (a, size, p, f, fd, w), MAP_FAILED)
CALL(void *, mmap64, MAP, (void *a, size_t size, int p, int f, int fd, off64_t w), (a, size, p, f, fd, w), MAP_FAILED)

int unlink(const char *path)
{
    REAL(unlink);
    int what = strike_path(UNLINK, path);
    STRUCK(what, -1)
    int result = real(path);
    DONE(what);
    return result;
}

#define OPENER(name) \
    int name(const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int what = strike_path(OPEN, path); \
        STRUCK(what, -1) \
        int result = real(path, flags, mode); \
        DONE(what); \
        return result; \
    }

OPENER(open)
OPENER(open64)

/* Whether a call may find that somebody else has the lock. */
static int takes_lock(int command, void *argument)
{
    static int is_exclusive;
    struct flock *lock = argument;
    if (command != F_SETLK || lock->l_type == F_UNLCK)
        return 0;
    if (lock->l_start != 0x40000002) /* SQLite's SHARED_FIRST. */
        return 1;
    int gives_way = is_exclusive && lock->l_type == F_RDLCK; /* Who does so always succeeds. */
    is_exclusive = lock->l_type == F_WRLCK;
    return !gives_way;
}

#define LOCKER(name) \
    int name(int fd, int command, ...) \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, command); \
        void *argument = va_arg(rest, void *); \
        va_end(rest); \
        int what = takes_lock(command, argument) ? strike(LOCK, fd) : 0; \
        STRUCK(what, -1) \
        int result = real(fd, command, argument); \
        DONE(what); \
        return result; \
    }

LOCKER(fcntl)
LOCKER(fcntl64)
