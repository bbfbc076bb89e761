// java Client.java URL GUARDED_URL PHOTO: lines of name, status and body in base64, by the clients that Java comes with.
import java.io.*;
import java.net.*;
import java.net.http.*;
import java.net.http.HttpRequest.*;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.CompletableFuture;
import java.util.stream.Collectors;

public class Client {
    // Prefers HTTP/2, so every plain request carries an offer of an upgrade.
    static final HttpClient http = HttpClient.newHttpClient();
    static String url;

    static HttpRequest.Builder to(String path) {
        return HttpRequest.newBuilder(URI.create(path.startsWith("http") ? path : url + path));
    }

    static HttpRequest json(String path, String body) {
        return to(path).header("Content-Type", "application/json").POST(BodyPublishers.ofString(body)).build();
    }

    static HttpRequest form(String path, byte[] photo, String fields) throws IOException {
        var body = new ByteArrayOutputStream();
        body.write("--limit\r\nContent-Disposition: form-data; name=\"image\"; filename=\"a.png\"\r\nContent-Type: image/png\r\n\r\n".getBytes(StandardCharsets.UTF_8));
        body.write(photo);
        body.write(("\r\n" + fields + "--limit--\r\n").getBytes(StandardCharsets.UTF_8));
        return to(path).header("Content-Type", "multipart/form-data; boundary=limit").POST(BodyPublishers.ofByteArray(body.toByteArray())).build();
    }

    static final String PROMPT = "--limit\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\n1\r\n";

    static void show(String name, int status, byte[] body) {
        System.out.println(name + " " + status + " " + Base64.getEncoder().encodeToString(body));
    }

    static void send(String name, HttpRequest request) throws Exception {
        var answer = http.send(request, HttpResponse.BodyHandlers.ofByteArray());
        show(name, answer.statusCode(), answer.body());
    }

    static void old(String name, String path, int chunk, byte[] body) throws Exception {
        var connection = (HttpURLConnection) new URL(url + path).openConnection();
        connection.setDoOutput(true);
        connection.setRequestProperty("Content-Type", "image/png");
        if (chunk > 0) connection.setChunkedStreamingMode(chunk); else connection.setFixedLengthStreamingMode(body.length);
        try (var out = connection.getOutputStream()) { out.write(body); }
        show(name, connection.getResponseCode(), connection.getInputStream().readAllBytes());
    }

    public static void main(String[] arguments) throws Exception {
        url = arguments[0];
        var photo = Files.readAllBytes(Path.of(arguments[2]));
        var big = new byte[29_000_000];
        for (int round = 0; round < 2; round++) { // again, on connections that were kept
            send("get", to("/generate?class=207&seed=7").build());
            send("json", json("/generate", "{\"class\": 207, \"seed\": 7}"));
            send("openai", json("/v1/images/generations", "{\"prompt\": \"207\", \"seed\": 7}"));
            send("form", form("/reconstruct", photo, ""));
            send("edits", form("/v1/images/edits", photo, PROMPT));
            send("raw", to("/reconstruct").header("Content-Type", "image/png").POST(BodyPublishers.ofByteArray(photo)).build());
            send("chunked", to("/reconstruct").header("Content-Type", "image/png").POST(BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(photo))).build());
            old("old", "/reconstruct?format=png", 0, photo);
            old("old-chunked", "/reconstruct?format=png", 512, photo);
            send("large", form("/reconstruct", big, ""));
            send("large-chunked", to("/reconstruct").header("Content-Type", "image/png").POST(BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(big))).build());
            send("key", form(arguments[1] + "/reconstruct", big, ""));
        }
        var together = new ArrayList<CompletableFuture<HttpResponse<byte[]>>>();
        for (int number = 0; number < 8; number++)
            together.add(http.sendAsync(json("/generate", "{\"class\": 207, \"seed\": 7}"), HttpResponse.BodyHandlers.ofByteArray()));
        for (var answer : together) show("together", answer.get().statusCode(), answer.get().body());
        var events = http.send(json("/generate", "{\"class\": 207, \"n\": 2, \"format\": \"events\"}"), HttpResponse.BodyHandlers.ofLines());
        show("events", events.statusCode(), events.body().filter(line -> line.startsWith("event:") && !line.endsWith("preview")).collect(Collectors.joining(",")).getBytes());
    }
}
