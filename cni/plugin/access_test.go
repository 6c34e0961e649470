package plugin

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

const token = "the-token"

// podPath and namespacePath are of the pod in kubernetes.
const podPath, namespacePath = "/api/v1/namespaces/app/pods/web-0", "/api/v1/namespaces/app"

// apiObjects answers with objects by path, and with 404 for others, to who has the token.
type apiObjects map[string]string

func (o apiObjects) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	text, ok := o[r.URL.Path]
	switch {
	case r.Header.Get("Authorization") != "Bearer "+token:
		w.WriteHeader(http.StatusUnauthorized)
	case !ok:
		w.WriteHeader(http.StatusNotFound)
	}
	io.WriteString(w, text)
}

func podObject(labels, rest string) string {
	return `{"kind":"Pod","apiVersion":"v1","metadata":{"name":"web-0","namespace":"app","uid":"u-1","labels":{` + labels + `}}` + rest + `}`
}

func namespaceObject(labels string) string {
	return `{"kind":"Namespace","apiVersion":"v1","metadata":{"name":"app","uid":"u-n","labels":{` + labels + `}}}`
}

// labels as they are written in objects.
const ambient, none = `"istio.io/dataplane-mode":"ambient"`, `"istio.io/dataplane-mode":"none"`

// accessFor writes the access to a server, changed before, and returns the file.
func accessFor(t *testing.T, server *httptest.Server, change ...func(*Access)) string {
	t.Helper()
	access := Access{Server: server.URL, Token: token}
	if certificate := server.Certificate(); certificate != nil {
		access.CA = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw}))
	}
	for _, c := range change {
		c(&access)
	}
	text, err := json.Marshal(access)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "access.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// newServer is an API server whose complaints about clients that do not trust it are not shown.
func newServer(t *testing.T, h http.Handler) *httptest.Server {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	return server
}

// awayWith runs ADD with no agent, with an access file, and with a record.
func awayWith(t *testing.T, access, record string) (string, bool) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mesh.json")
	if record != "" {
		if err := os.WriteFile(path, []byte(record), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return run(t, "ADD", "1.0.0", kubernetes, `,"eventSocket":"/nowhere/event.sock","apiAccess":"`+access+`","record":"`+path+`"`, previous)
}

// What the record says of the pod in kubernetes.
const recordOutside, recordInside = `{"Namespaces":["shop"]}`, `{"Namespaces":["app"]}`

// Without an agent the API server's objects decide, whatever the record says.
func TestAPIServerDecidesWithoutAnAgent(t *testing.T) {
	for _, tc := range []struct {
		name           string
		pod, namespace string // empty: there is none
		ok             bool
		says           string
	}{
		{"neither is labelled", podObject("", ""), namespaceObject(""), true, ""},
		{"the pod is", podObject(ambient, ""), namespaceObject(""), false, "the pod's label opts in"},
		{"the namespace is", podObject("", ""), namespaceObject(ambient), false, "the namespace's label opts in"},
		{"the pod opts out", podObject(none, ""), namespaceObject(ambient), true, ""},
		{"the pod has a sidecar", podObject(ambient, "")[:len(podObject(ambient, ""))-2] + `,"annotations":{"sidecar.istio.io/status":"{}"}}}`, namespaceObject(ambient), true, ""},
		{"the pod uses the host's network", podObject(ambient, `,"spec":{"hostNetwork":true}`), namespaceObject(ambient), true, ""},
		{"the pod has ended", podObject(ambient, `,"status":{"phase":"Failed"}`), namespaceObject(ambient), true, ""},
		{"the pod runs", podObject(ambient, `,"status":{"phase":"Running"}`), namespaceObject(""), false, "opts in"},
		{"there is no such pod, its namespace is labelled", "", namespaceObject(ambient), false, "the namespace's label opts in"},
		{"another pod of that name, its namespace is labelled", strings.Replace(podObject(none, ""), "u-1", "u-2", 1), namespaceObject(ambient), false, "opts in"},
		{"a static pod", strings.Replace(podObject(none, ""), `"uid":"u-1"`, `"uid":"u-2","annotations":{"kubernetes.io/config.mirror":"u-1"}`, 1), namespaceObject(ambient), true, ""},
		{"no such namespace, the pod is labelled", podObject(ambient, ""), "", false, "the pod's label opts in"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			objects := apiObjects{}
			if tc.pod != "" {
				objects[podPath] = tc.pod
			}
			if tc.namespace != "" {
				objects[namespacePath] = tc.namespace
			}
			access := accessFor(t, newServer(t, objects))
			for _, record := range []string{recordOutside, recordInside, ""} {
				out, ok := awayWith(t, access, record)
				if ok != tc.ok || !strings.Contains(out, tc.says) || strings.Contains(out, token) {
					t.Errorf("with record %s: succeeded %v, said %s; want %v, %q", record, ok, out, tc.ok, tc.says)
				}
				if !ok && !strings.Contains(out, "waits for the mesh's cni-agent") {
					t.Errorf("with record %s: does not say for what it waits: %s", record, out)
				}
				if ok {
					sameJSON(t, previous, out)
				}
			}
		})
	}
}

// Where the API server cannot be asked or does not know, the record decides, and it is said why.
func TestRecordDecidesWithoutTheAPIServer(t *testing.T) {
	// All of these servers would say the contrary of what the record says of the pod.
	status := func(code int) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			io.WriteString(w, podObject(ambient, ""))
		})
	}
	text := func(format string, args ...any) http.Handler {
		return apiObjects{podPath: fmt.Sprintf(format, args...), namespacePath: namespaceObject(ambient)}
	}
	labelled := apiObjects{podPath: podObject(ambient, ""), namespacePath: namespaceObject(ambient)}
	elsewhere := newServer(t, labelled)
	for _, tc := range []struct {
		name   string
		server http.Handler
		change func(*Access)
		says   string
	}{
		{"the token has expired", labelled, func(a *Access) { a.Token = "old" }, "401"},
		{"the account may not", status(403), nil, "403"},
		{"the server is overloaded", status(429), nil, "429"},
		{"the server is starting", status(500), nil, "500"},
		{"the server sends elsewhere", http.RedirectHandler(elsewhere.URL+podPath, http.StatusFound), func(a *Access) {
			a.CA += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: elsewhere.Certificate().Raw}))
		}, "302"},
		{"not that server's certificate", labelled, func(a *Access) { a.CA = testenv.Certificate }, "x509"},
		{"not a certificate", labelled, func(a *Access) { a.CA = "none" }, "no certificate"},
		{"the system's certificates", labelled, func(a *Access) { a.CA = "" }, "x509"},
		{"another name in the certificate", labelled, func(a *Access) { a.ServerName = "kubernetes.default.svc" }, "x509"},
		{"the server is gone", labelled, func(a *Access) { a.Server = "https://127.0.0.1:1" }, "refused"},
		{"nonsense", text("yes"), nil, "invalid character"},
		{"another object", text("%s", strings.Replace(podObject(ambient, ""), "web-0", "web-1", 1)), nil, "another object"},
		{"an object of another kind", text("%s", strings.Replace(podObject(ambient, ""), "Pod", "Secret", 1)), nil, "another object"},
		{"an answer without end", text("%s", podObject(ambient, `,"x":"`+strings.Repeat("x", maxObject)+`"`)), nil, "more than"},
		{"a deep answer", text("%s", podObject(ambient, `,"x":`+strings.Repeat("[", 100_000))), nil, "exceeded max depth"},
		{"headers without end", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 1<<20))
			labelled.ServeHTTP(w, r)
		}), nil, "header"},
		{"neither pod nor namespace is there", apiObjects{}, nil, "not found"},
		{"no such pod, its namespace is not labelled", apiObjects{namespacePath: namespaceObject("")}, nil, "not found"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var changes []func(*Access)
			if tc.change != nil {
				changes = append(changes, tc.change)
			}
			recordDecides(t, accessFor(t, newServer(t, tc.server), changes...), tc.says)
		})
	}
}

// recordDecides fails the test unless, with an access of which nothing comes, pods start as the record has it.
func recordDecides(t *testing.T, access, says string) {
	t.Helper()
	for record, want := range map[string]bool{recordOutside: true, recordInside: false, "": false, "{": false} {
		out, ok := awayWith(t, access, record)
		if ok != want || !ok && !strings.Contains(out, says) || strings.Contains(out, token) {
			t.Errorf("with record %q: succeeded %v, said %s; want %v, and why: %s", record, ok, out, want, says)
		}
	}
}

// A slow API server holds nobody for longer than the one time for all questions.
func TestSlowAPIServerHoldsNobody(t *testing.T) {
	for name, handler := range map[string]http.HandlerFunc{
		"no answer": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"a byte at a time": func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				io.WriteString(w, " ")
				w.(http.Flusher).Flush()
				time.Sleep(50 * time.Millisecond)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			access := accessFor(t, newServer(t, handler))
			start := time.Now()
			out, ok := awayWith(t, access, recordOutside)
			if took := time.Since(start); !ok || took < questionTime || took > time.Minute {
				t.Errorf("succeeded %v after %v: %s", ok, took, out)
			}
		})
	}
}

// Only what this user wrote for itself is believed.
func TestAccessOfOthersIsNotBelieved(t *testing.T) {
	server := newServer(t, apiObjects{podPath: podObject(none, ""), namespacePath: namespaceObject("")})
	good := accessFor(t, server)
	if out, ok := awayWith(t, good, recordInside); !ok {
		t.Fatalf("control: the server lets the pod start: %s", out)
	}
	content, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(good, link); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, path, says string }{
		{"no file", filepath.Join(dir, "none"), "no such file"},
		{"a directory", dir, "not a file of this user alone"},
		{"a link", link, "read the access"},
		{"readable by all", file("readable", string(content), 0o644), "not a file of this user alone"},
		{"writable by the group", file("writable", string(content), 0o620), "not a file of this user alone"},
		{"empty", file("empty", "", 0o600), "read the access"},
		{"nonsense", file("nonsense", "{", 0o600), "read the access"},
		{"no token", file("no-token", `{"Server":"`+server.URL+`"}`, 0o600), "no https server and token"},
		{"readable on its way", file("plain", strings.Replace(string(content), "https:", "http:", 1), 0o600), "no https server and token"},
		{"endless", file("endless", string(content)+strings.Repeat(" ", maxAccess), 0o600), "more than"},
	} {
		t.Run(tc.name, func(t *testing.T) { recordDecides(t, tc.path, tc.says) })
	}
	t.Run("another user's", func(t *testing.T) {
		testenv.RequireRoot(t)
		path := file("foreign", string(content), 0o600)
		if err := os.Chown(path, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		recordDecides(t, path, "not a file of this user alone")
	})
}

// A pod of which the API server once said that it is of the mesh goes on waiting when that is away, until it says otherwise.
func TestAnswersAreRemembered(t *testing.T) {
	var objects atomic.Pointer[apiObjects]
	access := accessFor(t, newServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { objects.Load().ServeHTTP(w, r) })))
	step := func(what, pod, namespace string, want bool, says string) {
		t.Helper()
		objects.Store(&apiObjects{podPath: pod, namespacePath: namespace})
		out, ok := awayWith(t, access, recordOutside)
		if ok != want || !strings.Contains(out, says) {
			t.Errorf("%s: succeeded %v: %s", what, ok, out)
		}
	}
	step("never asked", "nonsense", "", true, "")
	step("labelled", podObject(ambient, ""), namespaceObject(""), false, "opts in")
	step("away", "nonsense", "", false, "had it in the mesh before; the API server does not say")
	step("another pod of that name is known", strings.Replace(podObject("", ""), "u-1", "u-2", 1), namespaceObject(""), false, "had it in the mesh before")
	step("no longer labelled", podObject("", ""), namespaceObject(""), true, "")
	step("away again", "nonsense", "", true, "")
	step("labelled again", podObject(ambient, ""), namespaceObject(""), false, "opts in")
	if err := ForgetHeld(access); err != nil {
		t.Fatal(err)
	}
	step("forgotten", "nonsense", "", true, "")
	if err := remember(access, "../escape", true); err != nil || held(access, "../access.json") {
		t.Errorf("a UID that is a path: %v, %v", err, held(access, "../access.json"))
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(access), "escape")); err == nil {
		t.Error("a UID led out of the directory")
	}
}

// An agent that answers is the only one to be asked, unless it says that it cannot tell.
func TestAPIServerIsAskedOnlyInTheAgentsPlace(t *testing.T) {
	asks := make(chan string, 10)
	objects := apiObjects{podPath: podObject(ambient, ""), namespacePath: namespaceObject("")}
	access := accessFor(t, newServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asks <- r.Method + " " + r.URL.Path
		objects.ServeHTTP(w, r)
	})))
	for _, tc := range []struct {
		status int
		body   string
		asks   []string
		ok     bool
	}{
		{200, `{"Redirected":false}`, nil, true},
		{400, "no such network namespace", nil, false},
		{500, "no node proxy is connected", nil, false},
		{503, "the node's cni-agent is starting", []string{"GET " + podPath, "GET " + namespacePath}, false},
	} {
		socket, _ := fakeAgent(t, tc.status, tc.body)
		out, ok := run(t, "ADD", "1.0.0", kubernetes, `,"eventSocket":"`+socket+`","apiAccess":"`+access+`"`, previous)
		var asked []string
		for len(asks) > 0 {
			asked = append(asked, <-asks)
		}
		if diff := cmp.Diff(tc.asks, asked); ok != tc.ok || diff != "" {
			t.Errorf("agent's answer %d: succeeded %v: %s; asked (-want +got):\n%s", tc.status, ok, out, diff)
		}
	}
}

func TestNamesThatWouldLeadElsewhere(t *testing.T) {
	for name, want := range map[string]bool{
		"web-0": true, "a.b": true, "": false, "..": false, ".": false, "a/b": false, "a%2fb": false, "a?b": false, "A": false, strings.Repeat("a", 254): false,
	} {
		if got := plain(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
}
