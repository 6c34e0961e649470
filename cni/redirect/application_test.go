package redirect_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

func TestMain(m *testing.M) {
	if a := os.Getenv("FAIRLEAD_TEST_CONNECT"); a != "" {
		application(a)
		return
	}
	if d := os.Getenv("FAIRLEAD_TEST_DOOMED"); d != "" {
		runDoomed(d)
	}
	if os.Getenv("FAIRLEAD_TEST_UNDO") != "" {
		undo()
		return
	}
	os.Exit(m.Run())
}

// application is the process that lab.connect starts: it makes one connection from the namespace in descriptor 3.
func application(arguments string) {
	var a attempt
	var o outcome
	if err := json.Unmarshal([]byte(arguments), &a); err != nil {
		panic(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), cmp.Or(a.Patience, 2*time.Second))
	defer cancel()
	start := time.Now()
	var conn net.Conn
	err := netns.Do(os.NewFile(3, "netns"), func() (err error) {
		if err := become(a.User); err != nil {
			return err
		}
		conn, err = dial(ctx, a)
		return err
	})
	o.Took = time.Since(start)
	if err != nil {
		o.Error = err.Error()
		errors.As(err, &o.Errno)
	} else {
		o.Local, o.Remote = addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr())
	}
	if err := json.NewEncoder(os.Stdout).Encode(o); err != nil {
		panic(err)
	}
}

// become makes the calling thread alone one of another user, with all capabilities.
func become(user int) error {
	if _, _, errno := unix.RawSyscall(unix.SYS_SETFSUID, uintptr(user), 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// dialAs connects from this process, as another user does.
func dialAs(ctx context.Context, user int, ns *os.File, dst netip.AddrPort) (conn *net.TCPConn, err error) {
	err = netns.Do(ns, func() error {
		if err := become(user); err != nil {
			return err
		}
		conn, err = netns.Dial(ctx, nil, netns.DialOptions{}, dst)
		return errors.Join(err, become(0))
	})
	return conn, err
}

func dial(ctx context.Context, a attempt) (net.Conn, error) {
	if !a.Dialer {
		opts := netns.DialOptions{Source: a.Source, Mark: a.Mark, Device: a.Device}
		return netns.Dial(ctx, nil, opts, a.Dst)
	}
	var dialer net.Dialer
	dialer.SetMultipathTCP(a.Multipath)
	return dialer.DialContext(ctx, "tcp", a.Dst.String())
}

// netnsState describes all that redirection may change in a namespace.
func netnsState(t *testing.T, ns *os.File) string {
	t.Helper()
	var state strings.Builder
	err := netns.Do(ns, func() error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := netlink.RuleList(family)
			if err != nil {
				return err
			}
			for _, r := range rules {
				fmt.Fprintf(&state, "%d rule %v mark %#x\n", family, r, r.Mark)
			}
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: redirect.Table}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return err
			}
			for _, r := range routes {
				fmt.Fprintf(&state, "%d route %v\n", family, r)
			}
			addrs, err := netlink.AddrList(nil, family)
			if err != nil {
				return err
			}
			for _, a := range addrs {
				fmt.Fprintf(&state, "%d address %v\n", family, a.IPNet)
			}
		}
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := conn.ListTables()
		if err != nil {
			return err
		}
		for _, table := range tables {
			fmt.Fprintf(&state, "table %s\n", table.Name)
		}
		for _, s := range []string{"ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"} {
			value, err := os.ReadFile("/proc/sys/net/" + s)
			if err != nil {
				return err
			}
			fmt.Fprintf(&state, "%s=%s", s, value)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return state.String()
}

// soon is a context for what should take no time.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func exchange(t *testing.T, a, b net.Conn) {
	t.Helper()
	if _, err := a.Write([]byte("over")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	b.SetReadDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.ReadFull(b, buf); err != nil || string(buf) != "over" {
		t.Fatalf("read %q: %v", buf, err)
	}
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0); err != nil {
		t.Error(err)
	}
}
