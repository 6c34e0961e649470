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
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// roles are what this program is started again as.
var roles = map[string]func(arguments []string) error{"server": serve, "proxy": proxy, "client": client, "nodeproxy": nodeProxy}

// namespace is the pod's, as start hands it over.
func namespace() *os.File { return os.NewFile(3, "netns") }

// serve answers each connection with what it sends.
func serve(arguments []string) error {
	l, err := netns.Listen(namespace(), "tcp4", netip.MustParseAddrPort(arguments[0]), 0, false)
	if err != nil {
		return err
	}
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			b := make([]byte, 64)
			for {
				n, err := conn.Read(b)
				if err != nil {
					return
				}
				if _, err := conn.Write(b[:n]); err != nil {
					return
				}
			}
		}()
	}
}

// proxy accepts, connects to where the connection was opened to, and lets the kernel copy. It is told when to listen, by
// the directory of its slots, and asked by further lines how many connections it has taken since the last.
func proxy(arguments []string) error {
	ns, mode := namespace(), redirect.Mode(arguments[0])
	told := bufio.NewScanner(os.Stdin)
	if !told.Scan() {
		return told.Err()
	}
	at, mark := netip.AddrPortFrom(netip.IPv4Unspecified(), proxyPort), netns.ProxyMark
	if mode == redirect.EBPF {
		at, mark = netip.MustParseAddrPort("127.0.0.1:0"), netns.RedirectMark
	}
	l, err := netns.Listen(ns, "tcp4", at, mark, true)
	if err != nil {
		return err
	}
	if mode == redirect.EBPF {
		if err := fill(told.Text(), ns, l); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	var taken atomic.Int64
	go func() {
		for told.Scan() {
			fmt.Println(taken.Swap(0))
		}
	}()
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			return err
		}
		taken.Add(1)
		go splice(ns, conn, mode)
	}
}

// fill puts the listener in the pod's slot.
func fill(bpffs string, ns *os.File, l *net.TCPListener) error {
	cookie, err := netns.Cookie(ns)
	if err != nil {
		return err
	}
	slots, err := bpf.OpenListeners(bpffs, cookie)
	if err != nil {
		return err
	}
	defer slots.Close()
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) { set = slots.Set(bpf.OutboundIPv4, int(fd)) })
	return errors.Join(err, set)
}

func splice(ns *os.File, app *net.TCPConn, mode redirect.Mode) {
	defer app.Close()
	asked := app.LocalAddr().(*net.TCPAddr).AddrPort()
	if mode != redirect.EBPF {
		var err error
		if asked, err = originalDestination(app); err != nil {
			fmt.Fprintln(os.Stderr, "proxy:", err)
			return
		}
	}
	upstream, err := netns.Dial(context.Background(), ns, netns.DialOptions{Mark: netns.ProxyMark}, asked)
	if err != nil {
		fmt.Fprintln(os.Stderr, "proxy:", err)
		return
	}
	defer upstream.Close()
	done := make(chan struct{})
	go func() {
		_, _ = io.Copy(app, upstream) // ends with a reset
		close(done)
	}()
	_, _ = io.Copy(upstream, app)
	_ = upstream.SetLinger(0) // leaves no TIME-WAIT, as the application does not
	upstream.Close()
	<-done
}

// originalDestination asks for what the kernel has rewritten (SO_ORIGINAL_DST of netfilter's headers).
func originalDestination(conn *net.TCPConn) (netip.AddrPort, error) {
	const soOriginalDst = 80
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var sa unix.RawSockaddrInet4
	var errno unix.Errno
	err = raw.Control(func(fd uintptr) {
		size := uint32(unix.SizeofSockaddrInet4)
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_IP, soOriginalDst,
			uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), 0)
	})
	if err == nil && errno != 0 {
		err = errno
	}
	port := (*[2]byte)(unsafe.Pointer(&sa.Port))
	return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(port[0])<<8|uint16(port[1])), err
}

// client connects again and again, with threads that block, and prints a figure.
func client(arguments []string) error {
	to, ns := netip.MustParseAddrPort(arguments[0]), namespace()
	workers, err := strconv.Atoi(arguments[1])
	if err != nil {
		return err
	}
	duration, err := time.ParseDuration(arguments[2])
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var times []time.Duration
	var failed int
	var all sync.WaitGroup
	end := time.Now().Add(duration)
	for range workers {
		all.Go(func() {
			var mine []time.Duration
			bad := 0
			err := netns.Do(ns, func() error {
				for began := time.Now(); began.Before(end); began = time.Now() {
					if err := exchange(to); err != nil {
						bad++
						continue
					}
					mine = append(mine, time.Since(began))
				}
				return nil
			})
			if err != nil {
				bad++
			}
			mu.Lock()
			defer mu.Unlock()
			times, failed = append(times, mine...), failed+bad
		})
	}
	all.Wait()
	f := map[string]any{"PerSecond": float64(len(times)) / duration.Seconds(), "Failed": failed}
	if slices.Sort(times); len(times) > 0 {
		f["P50"], f["P99"] = times[len(times)/2], times[len(times)*99/100]
	}
	return json.NewEncoder(os.Stdout).Encode(f)
}

// exchange connects, sends a byte and waits for it to come back.
func exchange(to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
		return err
	}
	b := []byte{'x'}
	if _, err := unix.Write(fd, b); err != nil {
		return err
	}
	for {
		n, err := unix.Read(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n != 1 {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
}
