package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// world is a host, which is this process's network namespace, with a server and one pod for each lane.
type world struct {
	dir    string
	root   string // cgroup
	server netip.AddrPort
	echo   *exec.Cmd
	pods   []*pod
	end    []func() error // in the opposite order
}

// pod is a network namespace behind a routed veth.
type pod struct {
	lane   string
	mode   redirect.Mode
	ns     *os.File
	addr   netip.Addr
	cgroup string
	proxy  *exec.Cmd
	tell   io.Writer
	hear   *bufio.Scanner
}

func newWorld() (w *world, err error) {
	w = &world{}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.dir, err = os.MkdirTemp("", "fairlead-bench-redirect"); err != nil {
		return w, err
	}
	w.later(func() error { return os.RemoveAll(w.dir) })
	mount, err := bpf.FindCgroup2("/proc/self/mounts")
	if err != nil {
		return w, err
	}
	w.root = filepath.Join(mount, "fairlead-bench-redirect-"+strconv.Itoa(os.Getpid()))
	if err := w.makeCgroup(w.root); err != nil {
		return w, err
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		return w, err
	}
	server, err := w.addPod("server", 1)
	if err != nil {
		return w, err
	}
	w.server = netip.AddrPortFrom(server.addr, 8080)
	w.echo, _, _, err = w.start(server, filepath.Join(server.cgroup, "proxy"), "server", w.server.String())
	return w, err
}

// later calls f when the world ends.
func (w *world) later(f func() error) { w.end = append(w.end, f) }

func (w *world) close() error {
	var errs []error
	for i := len(w.end) - 1; i >= 0; i-- {
		errs = append(errs, w.end[i]())
	}
	return errors.Join(errs...)
}

func (w *world) makeCgroup(path string) error {
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	w.later(func() error {
		err := os.Remove(path)
		for end := time.Now().Add(5 * time.Second); errors.Is(err, syscall.EBUSY) && time.Now().Before(end); err = os.Remove(path) {
			time.Sleep(10 * time.Millisecond) // its last process is on its way out
		}
		return err
	})
	return nil
}

// addPod makes a pod's namespace, link and cgroups: one for its proxy, one for its application.
func (w *world) addPod(name string, number byte) (*pod, error) {
	p := &pod{lane: name, addr: netip.AddrFrom4([4]byte{10, 78, number, 2}), cgroup: filepath.Join(w.root, fmt.Sprintf("pod%d", number))}
	for _, path := range []string{p.cgroup, filepath.Join(p.cgroup, "proxy"), filepath.Join(p.cgroup, "app")} {
		if err := w.makeCgroup(path); err != nil {
			return nil, err
		}
	}
	var err error
	if p.ns, err = netns.New(); err != nil {
		return nil, err
	}
	w.later(p.ns.Close)
	gateway := netip.AddrFrom4([4]byte{10, 78, number, 1})
	link := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("pod%d", number)}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(p.ns.Fd())),
	}
	if err := netlink.LinkAdd(link); err != nil {
		return nil, fmt.Errorf("add the pod's link: %w", err)
	}
	if err := addAddress(link.Name, gateway); err != nil {
		return nil, err
	}
	return p, netns.Do(p.ns, func() error {
		if err := addAddress("eth0", p.addr); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Gw: gateway.AsSlice()})
	})
}

// addAddress sets a link of the calling thread's namespace, and lo, up.
func addAddress(name string, addr netip.Addr) error {
	for _, device := range []string{"lo", name} {
		link, err := netlink.LinkByName(device)
		if err != nil {
			return err
		}
		if device == name {
			network := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(24, 32)}
			if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: network}); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	// Enough ports for connections in TIME-WAIT.
	return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("1024 65000"), 0)
}

// open makes a lane: a pod, its proxy and its redirection.
func (w *world) open(ctx context.Context, l lane) error {
	p, err := w.addPod(l.name, byte(len(w.pods)+2))
	if err != nil {
		return err
	}
	p.mode = l.mode
	w.pods = append(w.pods, p)
	if l.set == nil {
		return nil
	}
	if p.proxy, p.tell, p.hear, err = w.start(p, filepath.Join(p.cgroup, "proxy"), "proxy", string(l.mode)); err != nil {
		return err
	}
	if l.mode == "" {
		if err := p.listen(""); err != nil {
			return err
		}
	}
	return l.set(ctx, w, p)
}

// listen lets the proxy listen, in the pod's slots if those are under bpffs.
func (p *pod) listen(bpffs string) error {
	if _, err := fmt.Fprintln(p.tell, bpffs); err != nil {
		return err
	}
	if !p.hear.Scan() || p.hear.Text() != "ready" {
		return fmt.Errorf("the proxy ended: %q", p.hear.Text())
	}
	return nil
}

// taken is how many connections the proxy has taken since it was asked last.
func (p *pod) taken() (int, error) {
	if _, err := fmt.Fprintln(p.tell); err != nil {
		return 0, err
	}
	if !p.hear.Scan() {
		return 0, errors.New("the proxy ended")
	}
	return strconv.Atoi(p.hear.Text())
}

// start starts this program in a role. It finds the pod's namespace in descriptor 3.
func (w *world) start(p *pod, cgroup string, arguments ...string) (*exec.Cmd, io.Writer, *bufio.Scanner, error) {
	group, err := os.Open(cgroup)
	if err != nil {
		return nil, nil, nil, err
	}
	defer group.Close()
	cmd := exec.Command("/proc/self/exe", arguments...)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{p.ns}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd()), Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, nil, err
	}
	w.later(func() error {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // it was killed
		return nil
	})
	return cmd, in, bufio.NewScanner(out), nil
}

// used is the processor time of the server and of a pod's proxy.
func (w *world) used(p *pod) (time.Duration, error) {
	var all time.Duration
	for _, cmd := range []*exec.Cmd{w.echo, p.proxy} {
		if cmd == nil {
			continue
		}
		one, err := cpuOf(cmd.Process.Pid)
		if err != nil {
			return 0, err
		}
		all += one
	}
	return all, nil
}

// cpuOf is the processor time of a process, in the kernel's ticks of 10 ms.
func cpuOf(pid int) (all time.Duration, err error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// User and system time are the 12th and 13th field after the name, which is in parentheses.
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	for _, ticks := range fields[11:13] {
		n, err := strconv.Atoi(ticks)
		if err != nil {
			return 0, fmt.Errorf("read %s: %w", stat, err)
		}
		all += time.Duration(n) * 10 * time.Millisecond
	}
	return all, nil
}

// measure lets the pod's application connect for a while.
func (w *world) measure(p *pod, workers int, duration time.Duration) (figure, error) {
	f := figure{Lane: p.lane, Workers: workers}
	group, err := os.Open(filepath.Join(p.cgroup, "app"))
	if err != nil {
		return f, err
	}
	defer group.Close()
	cmd := exec.Command("/proc/self/exe", "client", w.server.String(), strconv.Itoa(workers), duration.String())
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{p.ns}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd()), Pdeathsig: syscall.SIGKILL}
	before, err := w.used(p)
	if err != nil {
		return f, err
	}
	out, err := cmd.Output()
	if err != nil {
		return f, fmt.Errorf("client: %w", err)
	}
	after, err := w.used(p)
	if err != nil {
		return f, err
	}
	if err := json.Unmarshal(out, &f); err != nil {
		return f, err
	}
	if f.PerSecond == 0 || f.Failed > 0 {
		return f, fmt.Errorf("%d connections failed, %.0f a second did not", f.Failed, f.PerSecond)
	}
	used := after - before + cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	f.CPU = used / time.Duration(f.PerSecond*duration.Seconds())
	if p.proxy == nil {
		return f, nil
	}
	if n, err := p.taken(); err != nil || float64(n) < f.PerSecond*duration.Seconds() {
		return f, fmt.Errorf("the proxy took %d connections of %.0f (%v)", n, f.PerSecond*duration.Seconds(), err)
	}
	return f, nil
}
