package redirect_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// doomed is what an agent in a process of its own does to the lab. It is ended, as by kill -9, before one of the system
// calls that change what the kernel holds: these are all the steps there are.
type doomed struct {
	Mode          redirect.Mode
	BPFFS, Cgroup string
	Verb          string
}

// excluded is the port that the verb "exclude" leaves out.
const excluded = 81

// target is the lab's pod as a verb wants it.
func (d doomed) target(ns *os.File) redirect.Pod {
	p := redirect.Pod{UID: "pod-uid", Netns: ns, IPs: []netip.Addr{pod4, pod6}, Fresh: d.Verb == "start"}
	if d.Verb == "exclude" {
		p.Exclude = mesh.Exclusions{Out: mesh.Exclusion{Ports: []uint16{excluded}}}
	}
	return p
}

// do does what the verb says.
func (d doomed) do(r *redirect.Redirector, ns *os.File) error {
	cookie, err := netns.Cookie(ns)
	if err != nil {
		return err
	}
	switch d.Verb {
	case "start", "capture", "exclude":
		if _, err := r.Prepare(context.Background(), d.target(ns)); err != nil {
			return err
		}
		_, err = r.Ensure(context.Background(), d.target(ns))
		return err
	case "release":
		return r.Release(cookie, ns)
	case "remove":
		return r.Remove(ns)
	}
	return fmt.Errorf("no such verb: %s", d.Verb)
}

// runDoomed is the agent's process: the host is descriptor 3, the pod 4. It says the number of the descriptor by which
// its system calls are watched.
func runDoomed(text string) {
	var d doomed
	err := json.Unmarshal([]byte(text), &d)
	host, pod := os.NewFile(3, "host"), os.NewFile(4, "pod")
	cfg := redirect.Config{Mode: d.Mode, BPFFS: d.BPFFS, Cgroup: d.Cgroup, HostNetns: host}
	watch := func() {
		fd, watchErr := watchChanges()
		err = errors.Join(err, watchErr)
		fmt.Println(fd)
	}
	switch d.Verb {
	case "install":
		watch()
		_, newErr := redirect.New(cfg)
		err = errors.Join(err, newErr)
	case "uninstall":
		watch()
		err = errors.Join(err, redirect.Uninstall(cfg))
	default:
		r, newErr := redirect.New(cfg)
		if err = errors.Join(err, newErr); err == nil {
			watch()
			err = errors.Join(err, d.do(r, pod))
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// watchChanges has each system call by which this process may change what the kernel keeps wait for whoever holds the
// descriptor that it returns (seccomp_unotify(2)).
func watchChanges() (int, error) {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		some  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
		// In struct seccomp_data, whose arguments are little endian here.
		number, first, third = 0, 16, 32
	)
	// What these commands of bpf(2) do ends with the process, or changes nothing.
	harmless := []uint32{unix.BPF_MAP_CREATE, unix.BPF_MAP_LOOKUP_ELEM, unix.BPF_MAP_GET_NEXT_KEY, unix.BPF_PROG_LOAD, unix.BPF_OBJ_GET,
		unix.BPF_PROG_GET_NEXT_ID, unix.BPF_MAP_GET_NEXT_ID, unix.BPF_PROG_GET_FD_BY_ID, unix.BPF_MAP_GET_FD_BY_ID, unix.BPF_OBJ_GET_INFO_BY_FD,
		unix.BPF_PROG_QUERY, unix.BPF_BTF_LOAD, unix.BPF_BTF_GET_FD_BY_ID, unix.BPF_BTF_GET_NEXT_ID, unix.BPF_MAP_LOOKUP_BATCH,
		unix.BPF_LINK_GET_FD_BY_ID, unix.BPF_LINK_GET_NEXT_ID, unix.BPF_MAP_FREEZE}
	program := []unix.SockFilter{
		{Code: load, K: number},
		{Code: equal, K: unix.SYS_BPF, Jf: uint8(len(harmless) + 3)},
		{Code: load, K: first},
	}
	for i, command := range harmless {
		program = append(program, unix.SockFilter{Code: equal, K: command, Jt: uint8(len(harmless) - i)})
	}
	program = append(program,
		unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_USER_NOTIF},
		unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: equal, K: unix.SYS_OPENAT, Jf: 4},
		unix.SockFilter{Code: load, K: third},
		unix.SockFilter{Code: some, K: unix.O_WRONLY | unix.O_RDWR, Jf: 1},
		unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_USER_NOTIF},
		unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW},
	)
	for _, call := range []uint32{unix.SYS_SENDTO, unix.SYS_SENDMSG, unix.SYS_MKDIRAT, unix.SYS_UNLINKAT, unix.SYS_MOUNT, unix.SYS_UMOUNT2} {
		program = append(program, unix.SockFilter{Code: equal, K: call, Jf: 1}, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_USER_NOTIF})
	}
	program = append(program, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
	all := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&all)))
	if errno != 0 {
		return -1, fmt.Errorf("watch system calls: %w", errno)
	}
	return int(fd), nil
}

// notice is struct seccomp_notif, verdict struct seccomp_notif_resp.
type notice struct {
	id         uint64
	pid, flags uint32
	call       int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

type verdict struct {
	id    uint64
	value int64
	errno int32
	flags uint32
}

// kill runs an agent and ends it before its change number at, from 1. It returns that change, or "" when the agent did all
// that it was to do with fewer.
func (l *lab) kill(t *testing.T, verb string, at int) (change string) {
	t.Helper()
	text, err := json.Marshal(doomed{l.cfg.Mode, l.cfg.BPFFS, l.cfg.Cgroup, verb})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "FAIRLEAD_TEST_DOOMED="+string(text))
	cmd.ExtraFiles = []*os.File{l.host, l.pod}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	var theirs int
	if _, err := fmt.Fscanln(out, &theirs); err != nil || theirs < 0 {
		t.Fatalf("the agent did not begin: %v", err)
	}
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	watched, err := unix.PidfdGetfd(pidfd, theirs, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watched)
	for seen := 0; ; {
		ready := []unix.PollFd{{Fd: int32(watched), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, 10_000); errors.Is(err, unix.EINTR) {
			continue
		}
		if ready[0].Revents == 0 {
			t.Fatalf("the agent stands still after %d changes", seen)
		}
		if ready[0].Revents&unix.POLLIN == 0 { // it has ended
			break
		}
		var n notice
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(watched), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n))); errno != 0 {
			continue // the call was interrupted
		}
		if what := n.change(); what != "" {
			if seen++; seen == at {
				cmd.Process.Kill()
				cmd.Wait()
				return what
			}
		}
		v := verdict{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		unix.Syscall(unix.SYS_IOCTL, uintptr(watched), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&v)))
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("an agent that nobody killed: %v", err)
	}
	return ""
}

// change names what a system call would change, "" when it is a question to netlink.
func (n *notice) change() string {
	switch n.call {
	case unix.SYS_BPF:
		return fmt.Sprintf("bpf command %d", n.args[0])
	case unix.SYS_SENDTO, unix.SYS_SENDMSG:
		memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", n.pid))
		if err != nil {
			return err.Error()
		}
		defer memory.Close()
		at := func(address uint64, size int) []byte {
			b := make([]byte, size)
			memory.ReadAt(b, int64(address))
			return b
		}
		message := n.args[1]
		if n.call == unix.SYS_SENDMSG { // struct msghdr, then struct iovec
			message = binary.NativeEndian.Uint64(at(binary.NativeEndian.Uint64(at(message+16, 8)), 8))
		}
		switch kind := binary.NativeEndian.Uint16(at(message+4, 2)); {
		case kind>>8 == unix.NFNL_SUBSYS_NFTABLES && kind&0xff%3 == 1: // NFT_MSG_GET…
			return ""
		case kind >= unix.RTM_BASE && kind < 0x100 && kind%4 == 2: // RTM_GET…
			return ""
		default:
			return fmt.Sprintf("netlink message %#x", kind)
		}
	}
	return map[int32]string{unix.SYS_OPENAT: "openat", unix.SYS_MKDIRAT: "mkdirat", unix.SYS_UNLINKAT: "unlinkat", unix.SYS_MOUNT: "mount",
		unix.SYS_UMOUNT2: "umount2"}[n.call]
}

// holdings lists all that redirection keeps in the kernel: pins, entries of maps, and what is in the network namespaces.
func (l *lab) holdings(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(l.cfg.BPFFS, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(l.cfg.BPFFS, path)
		fmt.Fprintln(&all, name)
		if entry.IsDir() || filepath.Dir(name) != "maps" {
			return nil
		}
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return err
		}
		defer m.Close()
		switch m.Type() {
		case ebpf.Hash, ebpf.LRUHash, ebpf.LPMTrie, ebpf.SockHash:
			var key []byte
			for next := m.NextKeyBytes; ; {
				var from any
				if key != nil {
					from = key
				}
				if key, err = next(from); err != nil || key == nil {
					return err
				}
				fmt.Fprintf(&all, "  %x\n", key)
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return all.String() + "pod:\n" + netnsState(t, l.pod) + "host:\n" + netnsState(t, l.host)
}

// TestKilledBeforeEachChange kills the agent at each of its steps. A pod that was redirected stays so; and an agent after
// it does what was to be done, of which nothing is left when the pod is let go.
func TestKilledBeforeEachChange(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode redirect.Mode) {
		l := newLab(t, mode)
		taken := make(chan accepted, 16)
		for _, port := range []uint16{80, excluded} {
			listen(t, "server", l.host, netip.AddrPortFrom(remote4, port), taken)
		}
		listen(t, "app", l.pod, netip.MustParseAddrPort("0.0.0.0:8080"), taken)
		l.ensure(t, pod4, pod6)
		listeners := l.proxy(t, taken)
		reach := func(port uint16) string {
			t.Helper()
			if o := l.app(t, attempt{Dst: netip.AddrPortFrom(remote4, port)}); o.Error != "" {
				return o.Error
			}
			a := next(t, taken)
			a.conn.Close()
			return a.by
		}
		l.redirector.Close()
		renew := func() *redirect.Redirector {
			t.Helper()
			r, err := redirect.New(l.cfg)
			if err == nil {
				err = r.EnsureProxy(os.Getpid())
			}
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		// capture has an agent capture the pod, and let the proxy put its listeners in place.
		capture := func(d doomed) *redirect.Redirector {
			t.Helper()
			r := renew()
			if err := d.do(r, l.pod); err != nil {
				t.Fatal(err)
			}
			if mode == redirect.EBPF {
				fillSlots(t, l, listeners)
			}
			return r
		}
		clean := func(r *redirect.Redirector) string {
			t.Helper()
			if err := r.Remove(l.pod); err != nil {
				t.Fatal(err)
			}
			if err := r.Prune(func(uint64) bool { return false }); err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			return l.holdings(t)
		}
		nothing := clean(capture(doomed{Verb: "capture"}))
		for _, tc := range []struct {
			name, verb string
			// captured tells that the pod is redirected before, kept that it is at each step.
			captured, kept bool
		}{
			{"a starting pod", "start", false, false},
			{"a running pod", "capture", false, false},
			{"exclusions", "exclude", true, true},
			{"release", "release", true, false},
			{"remove", "remove", true, false},
			{"a new agent", "install", true, true},
			{"uninstall", "uninstall", false, false},
			{"the first agent", "install", false, false},
		} {
			t.Run(tc.name, func(t *testing.T) {
				d := doomed{Verb: tc.verb}
				var steps []string
				for at := 1; ; at++ {
					if tc.captured {
						capture(doomed{Verb: "capture"}).Close()
					} else if tc.verb == "install" {
						if err := redirect.Uninstall(l.cfg); err != nil {
							t.Fatal(err)
						}
					}
					step := l.kill(t, tc.verb, at)
					if steps = append(steps, step); tc.kept {
						if by := reach(80); by != "outbound" {
							t.Errorf("killed before change %d (%s): connection taken by %s", at, step, by)
						}
					}
					switch tc.verb {
					case "release", "remove":
						r := renew()
						if err := d.do(r, l.pod); err != nil {
							t.Errorf("killed before change %d (%s): %v", at, step, err)
						}
						if by := reach(80); by != "server" {
							t.Errorf("killed before change %d (%s), and let go: connection taken by %s", at, step, by)
						}
						r.Close()
					case "uninstall":
						if err := redirect.Uninstall(l.cfg); err != nil {
							t.Errorf("killed before change %d (%s): %v", at, step, err)
						}
						if _, err := os.Stat(l.cfg.BPFFS); mode == redirect.EBPF && !errors.Is(err, fs.ErrNotExist) {
							t.Errorf("killed before change %d (%s): not all is uninstalled: %v", at, step, err)
						}
					default:
						if tc.verb == "install" {
							d.Verb = "capture"
						}
						r := capture(d)
						if holds, err := r.Holds(d.target(l.pod)); err != nil || !holds {
							t.Errorf("killed before change %d (%s): holds all: %v, %v", at, step, holds, err)
						}
						if by := reach(80); by != "outbound" {
							t.Errorf("killed before change %d (%s), and done again: connection taken by %s", at, step, by)
						}
						if by := reach(excluded); (by == "server") != (tc.verb == "exclude") {
							t.Errorf("killed before change %d (%s), and done again: connection to port %d taken by %s", at, step, excluded, by)
						}
						r.Close()
					}
					if diff := cmp.Diff(nothing, clean(renew())); diff != "" {
						t.Fatalf("killed before change %d (%s): left over (-nothing +is):\n%s", at, step, diff)
					}
					if step == "" {
						break
					}
				}
				t.Logf("%d changes: %s", len(steps)-1, strings.Join(slices.Compact(steps), ", "))
				if len(steps) < 2 {
					t.Errorf("only %d changes", len(steps)-1)
				}
			})
		}
	})
}
