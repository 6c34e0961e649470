package plugin

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" {
		Main("test")
		return
	}
	os.Exit(m.Run())
}

// asked is one request that the agent got.
type asked struct {
	path  string
	event Event
}

// fakeAgent answers every request with status and body, on the socket that it returns.
func fakeAgent(t *testing.T, status int, body string) (socket string, got *[]asked) {
	t.Helper()
	socket, got = filepath.Join(t.TempDir(), "event.sock"), &[]asked{}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := asked{path: r.Method + " " + r.URL.Path}
		if err := json.NewDecoder(r.Body).Decode(&a.event); err != nil && err != io.EOF {
			t.Errorf("the agent got no event: %v", err)
		}
		*got = append(*got, a)
		w.WriteHeader(status)
		io.WriteString(w, body)
	})}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return socket, got
}

const kubernetes = "IgnoreUnknown=1;K8S_POD_NAMESPACE=app;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u-1"

// previous is the result of the plugin before: a pod with an address of each family, and the host's end.
const previous = `{"cniVersion":"1.0.0","interfaces":[{"name":"veth1"},{"name":"eth0","sandbox":"/var/run/netns/cni-1"}],` +
	`"ips":[{"interface":1,"address":"10.0.0.2/24","gateway":"10.0.0.1"},{"interface":1,"address":"fd00::2/64"},{"interface":0,"address":"10.0.0.1/24"}],"dns":{}}`

// run calls the plugin as a runtime does, and returns its output and whether it succeeded.
func run(t *testing.T, command, version, args, conf, previous string) (string, bool) {
	t.Helper()
	config := `{"cniVersion":"` + version + `","name":"net","type":"` + Type + `"` + conf
	if previous != "" {
		config += `,"prevResult":` + previous
	}
	cmd := exec.Command(os.Args[0])
	cmd.Stdin = strings.NewReader(config + "}")
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID=c1", "CNI_NETNS=/var/run/netns/cni-1",
		"CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin", "CNI_ARGS="+args, "CNI_NETNS_OVERRIDE=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	err := cmd.Run()
	return out.String(), err == nil
}

func TestAdd(t *testing.T) {
	one := 1
	event := Event{
		Netns: "/var/run/netns/cni-1", PodName: "web-0", PodNamespace: "app", PodUID: "u-1", ContainerID: "c1",
		IPs: []IPConfig{{&one, "10.0.0.2/24"}, {&one, "fd00::2/64"}},
	}
	for _, tc := range []struct {
		name, args, conf, previous string
		status                     int
		body                       string
		asked                      []asked
		ok                         bool
		says                       string
	}{
		{"captured", kubernetes, "", previous, 200, `{"Redirected":true}`, []asked{{"POST /cmdadd", event}}, true, ""},
		{"not in the mesh", kubernetes, "", previous, 200, `{"Redirected":false}`, []asked{{"POST /cmdadd", event}}, true, ""},
		{"the agent refuses", kubernetes, "", previous, 503, "no node proxy is connected\n", []asked{{"POST /cmdadd", event}}, false,
			"pod app/web-0 is not captured by the mesh: no node proxy is connected"},
		{"the agent talks nonsense", kubernetes, "", previous, 200, "yes", []asked{{"POST /cmdadd", event}}, false, "decode the agent's answer"},
		{"excluded", kubernetes, `,"excludeNamespaces":["kube-system","app"]`, previous, 503, "", nil, true, ""},
		{"no Kubernetes pod", "", "", previous, 503, "", nil, true, ""},
		{"first in the list", kubernetes, "", "", 200, "{}", nil, false, "must come after another plugin"},
		{"bad result", kubernetes, "", `{"cniVersion":"1.0.0","ips":[{"address":"x"}]}`, 200, "{}", nil, false, "result of the plugin before"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			socket, got := fakeAgent(t, tc.status, tc.body)
			out, ok := run(t, "ADD", "1.0.0", tc.args, tc.conf+`,"eventSocket":"`+socket+`"`, tc.previous)
			if ok != tc.ok || !strings.Contains(out, tc.says) {
				t.Errorf("succeeded %v, said %s; want %v, %q", ok, out, tc.ok, tc.says)
			}
			if diff := cmp.Diff(tc.asked, *got, cmp.AllowUnexported(asked{})); diff != "" && !(len(tc.asked) == 0 && len(*got) == 0) {
				t.Errorf("the agent was asked (-want +got):\n%s", diff)
			}
			if ok {
				sameJSON(t, tc.previous, out)
			}
		})
	}
}

func TestResultKeepsTheVersionOfTheConfiguration(t *testing.T) {
	socket, _ := fakeAgent(t, 200, "{}")
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		before := strings.Replace(previous, "1.0.0", version, 1)
		if version == "0.4.0" {
			before = strings.ReplaceAll(before, `"interface":`, `"version":"4","interface":`)
			before = strings.Replace(before, `"version":"4","interface":1,"address":"fd`, `"version":"6","interface":1,"address":"fd`, 1)
		}
		out, ok := run(t, "ADD", version, kubernetes, `,"eventSocket":"`+socket+`"`, before)
		if !ok {
			t.Errorf("%s: %s", version, out)
			continue
		}
		sameJSON(t, before, out)
	}
}

func TestWithoutAnAgent(t *testing.T) {
	conf := `,"eventSocket":"/nowhere/event.sock"`
	for _, tc := range []struct {
		command, conf string
		ok            bool
		says          string
	}{
		{"ADD", "", false, "pod app/web-0 waits for the mesh's cni-agent of this node, which does not answer"},
		{"ADD", `,"excludeNamespaces":["app"]`, true, ""},
		{"DEL", "", true, ""},
		{"CHECK", "", false, "does not answer"},
		{"STATUS", "", false, "does not answer"},
		{"GC", "", true, ""},
	} {
		t.Run(tc.command+tc.conf, func(t *testing.T) {
			start := time.Now()
			out, ok := run(t, tc.command, "1.1.0", kubernetes, conf+tc.conf, strings.Replace(previous, "1.0.0", "1.1.0", 1))
			if ok != tc.ok || !strings.Contains(out, tc.says) {
				t.Errorf("succeeded %v, said %s; want %v, %q", ok, out, tc.ok, tc.says)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

func TestOtherCommandsAskTheAgent(t *testing.T) {
	for _, tc := range []struct {
		command string
		status  int
		path    string
		ok      bool
	}{
		{"DEL", 200, "POST /cmddel", true},
		{"DEL", 500, "POST /cmddel", true},
		{"CHECK", 200, "POST /cmdcheck", true},
		{"CHECK", 503, "POST /cmdcheck", false},
		{"STATUS", 200, "GET /status", true},
		{"STATUS", 503, "GET /status", false},
	} {
		socket, got := fakeAgent(t, tc.status, "{}")
		out, ok := run(t, tc.command, "1.1.0", kubernetes, `,"eventSocket":"`+socket+`"`, strings.Replace(previous, "1.0.0", "1.1.0", 1))
		if ok != tc.ok || len(*got) != 1 || (*got)[0].path != tc.path {
			t.Errorf("%s with status %d: succeeded %v (%s), asked %+v", tc.command, tc.status, ok, out, *got)
		}
	}
}

func TestSilentAgentDoesNotHoldThePluginForEver(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "event.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	start := time.Now()
	out, ok := run(t, "ADD", "1.0.0", kubernetes, `,"timeoutSeconds":1,"eventSocket":"`+socket+`"`, previous)
	if took := time.Since(start); ok || took > 4*time.Second || !strings.Contains(out, "does not answer") {
		t.Errorf("succeeded %v after %v: %s", ok, took, out)
	}
}

func sameJSON(t *testing.T, want, got string) {
	t.Helper()
	var w, g any
	if err := json.Unmarshal([]byte(want), &w); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(got), &g); err != nil {
		t.Fatalf("%s: %v", got, err)
	}
	for _, result := range []any{w, g} {
		// Some versions write what is empty, and some do not.
		m := result.(map[string]any)
		if dns, _ := m["dns"].(map[string]any); len(dns) == 0 {
			delete(m, "dns")
		}
	}
	if diff := cmp.Diff(w, g); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
}
